"""What monitoring asks over HTTP, on loopback: /livez, /readyz, /metrics (Prometheus).

GET /livez    200 while the gate's loop turns, else 503
GET /readyz   200 while a scan sent now would be done, else 503 with a line for each reason
GET /metrics  text format of Prometheus
"""

from __future__ import annotations

import http.server
import ipaddress
import logging
import re
import threading
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from lvseg.errors import InputError

LIVE_S = 10.0  # without a turn of its loop for this long the gate counts as dead
REQUEST_S = 5.0
PORT_MAX = 65535
STAGES = ("receive", "queue", "unpack", "read", "segment", "write")
BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)

log = logging.getLogger("serving.health")


class Metrics:
    """The server's figures, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"lvseg_{name}", what, labels, registry=self.registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"lvseg_{name}", what, labels, registry=self.registry)

        self.jobs_done = counter("jobs_done", "Jobs that ended with a result", "model")
        self.jobs_failed = counter("jobs_failed", "Jobs that ended without one", "code")
        self.refused = counter("requests_refused", "Requests that got an error for an answer", "code")
        self.handshakes_failed = counter("handshakes_failed", "Connections that never got to speak")
        self.workers_lost = counter("workers_lost", "Worker processes that died, fell silent or got stuck", "kind")
        self.reloads_failed = counter("model_reloads_failed", "Sets of models that did not take over")
        self.received_bytes = counter("received_bytes", "Bytes of scans that came in")
        self.sent_bytes = counter("sent_bytes", "Bytes of results that went out")
        self.jobs = gauge("jobs", "Jobs in the table", "state")
        self.clients = gauge("connections_speaking", "Connections heard of in the last ten minutes")
        self.workers = gauge("workers_ready", "Worker processes that take work", "kind")
        self.spool_free_bytes = gauge("spool_free_bytes", "Free space of the spool's disk")
        self.model = gauge("model_info", "1 for each version that is served", "model", "version", "sha256")
        self.stage = Histogram(
            "lvseg_stage_seconds", "Time of a job in each stage", ("stage",), buckets=BUCKETS_S, registry=self.registry
        )
        for stage in STAGES:
            self.stage.labels(stage)


class Health:
    """A small HTTP server in a thread of its own.

    Args:
        address: host:port on loopback, port 0 for any; None for none.
        metrics: what /metrics says.
        reasons: asked by /readyz; why no scan would be done now.

    Raises:
        InputError: BAD_CONFIG: the address is not on loopback, or taken.
    """

    def __init__(self, address: str | None, metrics: Metrics, reasons: Callable[[], list[str]]) -> None:
        self.address: str | None = None
        self._turned = time.monotonic()
        self._server: http.server.ThreadingHTTPServer | None = None
        if address is None:
            return
        host, port = _place(address)
        health = self

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = REQUEST_S
            server_version, sys_version = "lvseg", ""

            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._answer(200, generate_latest(metrics.registry), CONTENT_TYPE_LATEST)
                elif self.path == "/livez":
                    self._say([] if health.is_live() else ["the gate's loop does not turn"])
                elif self.path == "/readyz":
                    self._say(reasons() if health.is_live() else ["the gate's loop does not turn"])
                else:
                    self._answer(404, b"expected /livez, /readyz or /metrics\n", "text/plain; charset=utf-8")

            def _say(self, problems: list[str]) -> None:
                text = "".join(f"{problem}\n" for problem in problems) or "ok\n"
                self._answer(503 if problems else 200, text.encode(), "text/plain; charset=utf-8")

            def _answer(self, status: int, body: bytes, content_type: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing: monitoring asks every few seconds."""

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *_: object) -> None:
                """Nothing: a monitor that hangs up is no fault of the server."""

        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            raise InputError(
                "BAD_CONFIG", f"Expected a free address as 'http', received '{error.strerror}' for {address}."
            ) from error
        self.address = f"http://{host}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True, name="health").start()

    def turn(self, now: float) -> None:
        """The gate's loop has turned, at a monotonic time."""
        self._turned = now

    def is_live(self) -> bool:
        """Whether it did lately."""
        return time.monotonic() - self._turned < LIVE_S

    def close(self) -> None:
        """Stops answering."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    try:
        if re.fullmatch(r"[0-9]{1,5}", port) and int(port) <= PORT_MAX and ipaddress.ip_address(host).is_loopback:
            return host, int(port)
    except ValueError:
        pass
    raise InputError(
        "BAD_CONFIG",
        f"Expected 'http' as an IPv4 loopback address and port, such as 127.0.0.1:9557, received {address}.",
    )

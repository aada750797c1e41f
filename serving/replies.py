"""Answers to clients: sent as connections take them, kept within bounds for those that do not read."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import zmq

from serving import protocol
from serving.health import Metrics

OUTBOX_MAX = 256

log = logging.getLogger("serving.replies")


class Refusal(Exception):
    """A request that gets an ERROR instead of its answer."""

    def __init__(
        self, code: str, stage: str, text: str, fault: str = "input", retryable: bool = False, retry_after_ms: int = 0
    ) -> None:
        super().__init__(text)
        self.code = code
        self.stage = stage
        self.text = text
        self.fault = fault
        self.retryable = retryable
        self.retry_after_ms = retry_after_ms

    def message(self, job: bytes) -> protocol.Error:
        """As it goes to the client."""
        text = protocol.clean(self.text)
        return protocol.Error(job, self.code, self.stage, self.fault, self.retryable, self.retry_after_ms, text)


@dataclass
class Outbox:
    """Answers that a connection has not taken yet; times in seconds of the monotonic clock."""

    heard: float
    owner: str
    waiting: deque[Any] = field(default_factory=deque)

    def keep(self, message: Any) -> None:
        """For later; of a job's news only the last counts."""
        if isinstance(message, protocol.Progress):
            old = (one for one in self.waiting if isinstance(one, protocol.Progress) and one.job == message.job)
            if (first := next(old, None)) is not None:
                self.waiting.remove(first)
        self.waiting.append(message)


class Replies:
    """The connections that were heard of, and what each is still to get.

    Args:
        front: the ROUTER that clients talk to.
        metrics: counts what is sent.
        read: the answer to a FETCH of an owner, made anew whenever it is tried to send it, so that no bytes of a file
            wait in memory.
    """

    def __init__(self, front: Any, metrics: Metrics, read: Callable[[str, protocol.Fetch], Any]) -> None:
        self._front = front
        self._metrics = metrics
        self._read = read
        self._boxes: dict[bytes, Outbox] = {}

    def __contains__(self, route: bytes) -> bool:
        return route in self._boxes

    def __len__(self) -> int:
        return len(self._boxes)

    @property
    def waiting(self) -> bool:
        """Whether any connection has not taken all that it is to get."""
        return any(box.waiting for box in self._boxes.values())

    def heard(self, route: bytes, owner: str, now: float) -> None:
        """A connection has spoken."""
        self._boxes.setdefault(route, Outbox(now, owner)).heard = now

    def silent_s(self, route: bytes, now: float) -> float:
        """How long ago a connection was heard last; infinite for one that is gone."""
        box = self._boxes.get(route)
        return now - box.heard if box else float("inf")

    def is_behind(self, route: bytes) -> bool:
        """Whether a connection is gone, or has not taken what it was sent before."""
        box = self._boxes.get(route)
        return box is None or bool(box.waiting)

    def forget_silent(self, now: float, limit_s: float, but: Container[bytes] = ()) -> None:
        """Forgets connections that have said nothing for so long, but for those that wait to hear of a job.

        One of those that is gone is forgotten once it is sent to.
        """
        for route, box in list(self._boxes.items()):
            if now - box.heard > limit_s and route not in but:
                del self._boxes[route]

    def forget_owners_but(self, owners: Container[str]) -> None:
        """Forgets the connections of everybody else."""
        for route, box in list(self._boxes.items()):
            if box.owner not in owners:
                del self._boxes[route]

    def send(self, route: bytes, message: Any) -> None:
        """Sends at once, or keeps for later what the connection does not take; forgets connections that are gone.

        What is kept for later of a file is the request, not its bytes.
        """
        box = self._boxes.get(route)
        if box is None:
            return  # gone; its jobs stay for STATUS from another connection
        if not box.waiting:
            answer = self._read(box.owner, message) if isinstance(message, protocol.Fetch) else message
            try:
                self._front.send_multipart([route, *protocol.encode(answer)], zmq.NOBLOCK)
                if isinstance(answer, protocol.Data):
                    self._metrics.sent_bytes.inc(len(answer.payload))
                return
            except zmq.Again:
                pass
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                del self._boxes[route]
                return
        box.keep(message)
        if len(box.waiting) > OUTBOX_MAX:
            log.info("a connection does not read its answers and is given up")
            del self._boxes[route]

    def flush(self) -> None:
        """Sends what connections take now."""
        for route, box in list(self._boxes.items()):
            waiting, box.waiting = box.waiting, deque()
            while waiting and route in self._boxes and not box.waiting:
                self.send(route, waiting.popleft())
            box.waiting.extend(waiting)

"""What an operator relies on: models exchanged under load and rolled back, monitoring, the log, stopping."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving_fixtures import LIMIT_S, Server, is_alive, make_models, make_version, running, start, until
from test_serving import ROOT, Raw, expect_right_mask, expect_serving, scan_file, send_all, submit_of

from lvseg.errors import InputError
from serving import admin, catalogue, protocol

LIMITS = {"spool_free_bytes": 0}


def served(server: Server) -> list[int]:
    """The versions that clients are told of."""
    with server.connect() as client:
        return [model.version for model in client.greeting.models]


def operator(server: Server, *arguments: object) -> int:
    """The operator's command on a server's lists."""
    return admin.main(["--access", str(server.models.parent / "access"), *map(str, arguments)])


def monitoring(server: Server) -> str:
    """Where monitoring asks."""
    found = until(lambda: re.search(r"monitoring at (http://[0-9.:]+)", server.log.read_text()), "its address is told")
    return str(found[1])


def get(address: str) -> tuple[int, str]:
    """Status and text of a page."""
    try:
        with urllib.request.urlopen(address, timeout=LIMIT_S) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def figure(server: Server, name: str) -> float:
    """One figure of /metrics."""
    _, text = get(monitoring(server) + "/metrics")
    (value,) = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(name + " ")]
    return float(value)


# ---- models


def test_good_bad_good_models_are_exchanged_under_load_without_a_lost_scan(tmp_path: Path) -> None:
    with running(tmp_path, http="127.0.0.1:0", limits=LIMITS) as server, ThreadPoolExecutor(3) as pool:
        stop = threading.Event()

        def load(number: int) -> int:
            scan, out, turns = scan_file(tmp_path, number, name=f"{number}.nii.gz"), tmp_path / f"m{number}.nii.gz", 0
            with server.connect() as client:
                while not stop.is_set():
                    client.segment(scan, "bright", out, LIMIT_S)
                    expect_right_mask(scan, out)
                    turns += 1
            return turns

        users = [pool.submit(load, number) for number in range(3)]
        (first,) = server.workers()
        try:
            assert operator(server, "allow-model", make_version(server.models, 4)) == 0
            until(lambda: served(server) == [4], "version 4 is served")
            until(lambda: not is_alive(first), "the process with version 3 has ended")
            before = server.workers()
            assert operator(server, "allow-model", make_version(server.models, 5, broken=True)) == 0
            until(lambda: figure(server, "lvseg_model_reloads_failed_total") == 1, "version 5 was refused")
            assert served(server) == [4]
            assert server.workers() == before  # never in doubt
            assert operator(server, "allow-model", make_version(server.models, 6)) == 0
            until(lambda: served(server) == [6], "version 6 is served")
            assert operator(server, "rollback", "bright", "--models", server.models) == 0
            assert operator(server, "rollback", "bright", "--models", server.models) == 0  # 5, which is broken, too
            until(lambda: served(server) == [4], "version 4 is served again")
        finally:
            stop.set()
        assert all(user.result(LIMIT_S) > 0 for user in users)
        assert {3, 4} <= set(server.runs("0.nii.gz") + server.runs("1.nii.gz") + server.runs("2.nii.gz"))
        until(lambda: len(server.workers()) == 1, "no process is left over")
        assert server.spooled() == []


def test_versions_side_by_side_are_asked_for_by_number(tmp_path: Path) -> None:
    with running(tmp_path, limits=LIMITS, serve={"bright": [1]}) as server, server.connect() as client:
        assert served(server) == [3, 1]
        scan = scan_file(tmp_path)
        for model in ("bright", "bright/1", "bright/3"):
            client.segment(scan, model, tmp_path / "mask.vtk", LIMIT_S)
        assert server.runs(scan.name) == [3, 1, 3]


def test_a_model_that_changed_after_it_was_allowed_is_not_loaded(tmp_path: Path) -> None:
    with running(tmp_path, limits=LIMITS):
        pass
    with (tmp_path / "models/bright/3/saved_model.pb").open("ab") as file:
        file.write(b"and more")
    process = start(tmp_path, limits=LIMITS)
    assert process.communicate(timeout=LIMIT_S)[0] == ""
    assert process.returncode == 2
    log = (tmp_path / "log").read_text()
    assert "Expected a model as it was allowed" in log
    assert admin.main(["--access", str(tmp_path / "access"), "allow-model", str(tmp_path / "models/bright/3")]) == 0
    with running(tmp_path, limits=LIMITS) as server:
        expect_serving(server, tmp_path)


def test_a_version_that_nobody_allowed_is_named_and_not_served(tmp_path: Path) -> None:
    with running(tmp_path, limits=LIMITS):
        pass
    make_version(tmp_path / "models", 9)
    with running(tmp_path, limits=LIMITS) as server:
        assert served(server) == [3]
        assert "not served, since not allowed (serving.admin allow-model): bright/9" in server.log.read_text()


def test_a_version_that_the_server_s_file_names_and_that_is_not_there_is_told(tmp_path: Path) -> None:
    with running(tmp_path, limits=LIMITS, serve={"bright": [1, 7], "brihgt": [3]}) as server:
        assert served(server) == [3, 1]
        (told,) = [line for line in server.log.read_text().splitlines() if "'serve'" in line]
        assert json.loads(told)["event"].endswith(": bright/7, brihgt/3")


def test_every_byte_and_name_of_a_version_counts(tmp_path: Path) -> None:
    version = make_version(tmp_path, 1)
    digests = {catalogue.digest_of(version)}
    (version / "variables").mkdir()
    (version / "variables" / "variables.index").write_bytes(b"ab")
    digests.add(catalogue.digest_of(version))
    (version / "variables" / "variables.index").write_bytes(b"ba")
    digests.add(catalogue.digest_of(version))
    (version / "variables" / "variables.index").rename(version / "variables" / "variables.data")
    digests.add(catalogue.digest_of(version))
    assert len(digests) == 4
    (version / "saved_model.pb").unlink()
    with pytest.raises(InputError, match=r"no saved_model\.pb"):
        catalogue.digest_of(version)


def test_a_version_is_allowed_under_the_name_in_its_models_folder_wherever_links_lead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, models, access = tmp_path / "store/of-bright", tmp_path / "models", tmp_path / "access"
    make_models(tmp_path / "made")
    (tmp_path / "store").mkdir()
    (tmp_path / "made/bright").rename(store)
    (store / "3").rename(tmp_path / "third")
    (store / "3").symlink_to(tmp_path / "third")
    models.mkdir()
    (models / "bright").symlink_to(store)
    (tmp_path / "link").symlink_to(models)
    monkeypatch.chdir(models)
    for version, path in ((1, tmp_path / "link/bright/1"), (3, Path("bright/3/"))):
        assert catalogue.allow(access, path).version == version
    entries = catalogue.read(access / "models.json", models)
    assert [(entry.model, entry.version) for entry in entries] == [("bright", 1), ("bright", 3)]


def test_there_is_no_rolling_back_beyond_the_first_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models, access = make_models(tmp_path / "models"), tmp_path / "access"
    catalogue.trust_on_first_start(access, models)
    assert catalogue.roll_back(access, models, "bright")[1].version == 1
    assert admin.main(["--access", str(access), "rollback", "bright", "--models", str(models)]) == 2
    assert "an earlier allowed version, received bright" in capsys.readouterr().err
    assert admin.main(["--access", str(access), "models"]) == 0
    assert capsys.readouterr().out.count("rolled back") == 1
    entries = catalogue.read(access / "models.json", models)
    assert [entry.version for entry in catalogue.to_serve(entries, {})] == [1]


# ---- monitoring, log, stopping


def test_monitoring_tells_alive_from_ready_and_counts(tmp_path: Path) -> None:
    make_models(tmp_path / "models")
    (tmp_path / "models" / ".hold").touch()  # warming up waits for it
    process = start(tmp_path, http="127.0.0.1:0", limits=LIMITS)
    server = Server(process, "", tmp_path / "models", tmp_path / "spool", tmp_path / "log")
    try:
        address = monitoring(server)
        assert get(address + "/livez") == (200, "ok\n")
        assert get(address + "/readyz") == (503, "models are being loaded\n")
        server.hold.unlink()
        assert process.stdout is not None
        server.endpoint = process.stdout.readline().split()[1]
        assert get(address + "/readyz") == (200, "ok\n")
        assert get(address + "/elsewhere")[0] == 404
        expect_serving(server, tmp_path)
        bad = tmp_path / "bad.nii.gz"
        bad.write_bytes(b"no scan")
        with Raw(server.endpoint) as peer:
            send_all(peer, bad.read_bytes())
            assert peer.take_until(protocol.Error).code == "UNSUPPORTED_FORMAT"
        until(lambda: figure(server, 'lvseg_jobs{state="failed"}') == 1, "the gauges follow")
        assert figure(server, 'lvseg_jobs_done_total{model="bright"}') == 1
        assert figure(server, 'lvseg_jobs_failed_total{code="UNSUPPORTED_FORMAT"}') == 1
        for stage in ("receive", "queue", "unpack", "read", "segment", "write"):
            assert figure(server, f'lvseg_stage_seconds_count{{stage="{stage}"}}') >= 1, stage
        for kind in ("unpack", "segment", "pack"):
            assert figure(server, f'lvseg_workers_ready{{kind="{kind}"}}') == 1
        process.send_signal(signal.SIGSTOP)  # the whole process: nobody answers, which a monitor takes for dead
        process.send_signal(signal.SIGCONT)
        assert get(address + "/livez")[0] == 200
    finally:
        process.terminate()
        process.communicate(timeout=LIMIT_S)


def test_every_line_of_the_log_is_json_without_a_name(tmp_path: Path) -> None:
    with running(tmp_path, limits=LIMITS) as server:
        with server.connect() as client:
            client.segment(scan_file(tmp_path, name="Doe_Jane.nii.gz"), "bright", tmp_path / "mask.vtk", LIMIT_S)
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert lines
    assert all(list(line)[:4] == ["time", "level", "from", "event"] for line in lines)
    assert any(re.fullmatch(r"job [0-9a-f]{12}: done", line["event"]) for line in lines)
    assert "Doe" not in server.log.read_text()


def test_at_sigterm_the_scan_at_work_is_done_and_the_next_one_waits_for_the_next_start(tmp_path: Path) -> None:
    first, second = scan_file(tmp_path), scan_file(tmp_path, 1, name="second.nii.gz")
    with running(tmp_path, limits=LIMITS) as server, Raw(server.endpoint) as peer:
        server.hold.touch()
        at_work = send_all(peer, first.read_bytes())
        while peer.take_until(protocol.Progress).stage != "segment":
            pass
        waiting = send_all(peer, second.read_bytes(), name=second.name)
        peer.take_until(protocol.Stored)
        server.process.terminate()
        until(lambda: "stopping: jobs at work" in server.log.read_text(), "it was told")
        server.hold.unlink()
        assert peer.take_until(protocol.Done).job == at_work
        stopping = peer.take_until(protocol.Error)
        assert (stopping.job, stopping.code) == (waiting, "SERVER_STOPPING")
        assert server.process.wait(LIMIT_S) == 0
    with running(tmp_path, limits=LIMITS) as server, Raw(server.endpoint) as peer:
        assert isinstance(peer.ask(protocol.Status(at_work)), protocol.Done)
        peer.socket.send_multipart(protocol.encode(protocol.Status(waiting)))
        assert peer.take_until(protocol.Done).job == waiting
        assert server.runs(first.name) == [3]


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    with running(tmp_path, limits=LIMITS) as server, Raw(server.endpoint) as peer:
        server.hold.touch()
        send_all(peer, scan_file(tmp_path).read_bytes())
        while peer.take_until(protocol.Progress).stage != "segment":
            pass
        server.process.terminate()
        until(lambda: "stopping: jobs at work" in server.log.read_text(), "it was told")
        began = time.monotonic()
        server.process.terminate()
        assert server.process.wait(LIMIT_S) == 0
        assert time.monotonic() - began < 10.0


def test_limits_of_a_client_are_told_as_busy(tmp_path: Path) -> None:
    limits = {**LIMITS, "jobs_per_client": 2, "submits_a_minute": 5}
    with running(tmp_path, limits=limits) as server, Raw(server.endpoint) as peer:
        for number in range(2):
            send_all(peer, scan_file(tmp_path, number).read_bytes())
            peer.take_until(protocol.Done)
        codes = []
        for number in range(2, 7):
            error = peer.ask(submit_of(scan_file(tmp_path, number).read_bytes()))
            codes.append((error.code, error.retryable, "a minute" in error.text))
        assert codes[:3] == [("BUSY", True, False)] * 3
        assert codes[-1] == ("BUSY", True, True)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "127.0.0.1:99999", "nonsense", "example.org:80"])
def test_monitoring_is_on_loopback_alone(tmp_path: Path, address: str) -> None:
    make_models(tmp_path / "models")
    process = start(tmp_path, http=address, limits=LIMITS)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2
    assert "Expected 'http' as an IPv4 loopback address" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_client_that_is_interrupted_ends_its_jobs(tmp_path: Path, number: int) -> None:
    with running(tmp_path, limits=LIMITS) as server:
        server.hold.touch()
        scans = [scan_file(tmp_path, seed, name=f"{seed}.nii.gz") for seed in range(3)]
        command = [sys.executable, "-m", "serving.client", "submit", "--insecure", "--server", server.endpoint]
        command += ["--model", "bright", "-o", str(tmp_path / "masks"), *map(str, scans)]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as client:
            until(lambda: len(server.spooled()) == 3, "all are sent")
            until(lambda: (server.models / ".runs").exists(), "one is segmented")
            client.send_signal(number)
            _, told = client.communicate(timeout=LIMIT_S)
        assert client.returncode == 1
        assert "interrupted; what was finished is kept" in told
        assert "Traceback" not in told
        until(lambda: server.spooled() == [] or server.hold.unlink(missing_ok=True), "the jobs are gone")


def test_the_client_s_commands_list_and_cancel(tmp_path: Path) -> None:
    with running(tmp_path, limits=LIMITS) as server, Raw(server.endpoint) as peer:

        def client(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "serving.client", arguments[0], "--insecure", "--server", server.endpoint,
                 *arguments[1:]], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S,
            )  # fmt: skip

        server.hold.touch()
        job = send_all(peer, scan_file(tmp_path).read_bytes(), name="mine.nii.gz")
        while peer.take_until(protocol.Progress).stage != "segment":
            pass
        assert client("status").stdout.split() == [job.hex()[:12], "bright", "segment", "mine.nii.gz"]
        for wrong in ("ffff", ""):  # the second is a variable of a script that was not set
            assert client("cancel", wrong).returncode == 2
        assert client("cancel", job.hex()[:12]).returncode == 0
        assert peer.take_until(protocol.Error).code == "CANCELLED"
        assert client("status").stdout == ""
        server.hold.unlink()

"""What several tests share: quiet TensorFlow, and one small study trained once."""

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Two processes of tests share the cores: a second thread of NumPy's would only wait for the first, at a core's cost.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Shards of a small study are made sooner by the process at hand than two more have imported TensorFlow.
os.environ.setdefault("LOKY_MAX_CPU_COUNT", "1")
# Traced graphs are millions of objects that stay; looking through them for garbage is a sixth of a test's time.
gc.set_threshold(100_000, 20, 20)

# Run in the background by a shell, this process ignores Ctrl-C, and so would those that it starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files of tests that take minutes begin first, so that no process is left with one of them at the end.
LONGEST = ("test_fit", "test_methods_volume", "test_methods_fatfraction", "test_train", "test_predict", "test_devices",
           "test_demo", "test_two_tensorflows", "test_pretrain", "test_prepare")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files by how long they take; tests of a file stay in their order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two scanners' scans, their cards and an experiment (small_study.py)."""
    from small_study import write_study

    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def trained(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of that experiment, trained to its end by the command in a process of its own."""
    from small_study import command

    from lvseg.command import alone

    run, base = study / "runs/volume/small-fold0", tmp_path_factory.getbasetemp()
    # The first process of tests that asks trains for all of them.
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    with alone(shared.with_name("trained.lock"), shared):
        if not shared.exists():
            done = command(study, "lvseg.train", "--cfg", "experiment.yaml")
            assert done.returncode == 0, done.stderr
            shutil.copytree(run, shared)
    if not run.exists():
        shutil.copytree(shared, run)
    return run


@pytest.fixture
def in_study(study: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The study as the working folder, as its experiment expects."""
    monkeypatch.chdir(study)
    yield study


@pytest.fixture
def real_data() -> Path:
    """The folder of real scans; skips where LVSEG_REAL_DATA does not name one."""
    folder = os.environ.get("LVSEG_REAL_DATA")
    if not folder:
        pytest.skip("LVSEG_REAL_DATA names no folder of real scans")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def vgg11_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder's weights, drawn at random, in the file layout of the pretrained ones."""
    from lvseg.models import vgg
    from lvseg.models.unet import unet

    path = tmp_path_factory.mktemp("weights") / "vgg11.safetensors"
    vgg.save_encoder(unet(32, 3, 2, 2, encoder="vgg11", seed=5), path, "drawn at random", {})
    return path

"""The training step: what the loop adds to it, against PyTorch, its memory, and the settings to choose from.

loop     the steps of lvseg.fit, with pipeline, augmentation and logging, against the bare compiled step; with patients
         rendered anew also against the compiled step that renders them, over and over of one batch
torch    the bare step against the same network in PyTorch
memory   peak memory of training, lvseg's loop and PyTorch's bare step
layout   the bare step with and without XLA, with channels last and first, and by numbers of threads

python benchmarks/training.py --only torch
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measure import ROOT, Row, main, run_script

CORES = len(os.sched_getaffinity(0))
PARTS = ("loop", "torch", "memory", "layout")
MOST_LOOP, MOST_TORCH, MOST_MEMORY = 1.05, 1.1, 1.3
WARM_UP_STEPS = 3
REPORT = {"size": 256, "width": 64, "batch_size": 1}
WIDE = [
    "data.size=256", "data.spacing_mm=[1.75, 1.75]", "model.width=64", "augment.elastic={sigma_px: 8.0, grid: 8}",
    "train.batch_size=1", "train.loss=cross_entropy", "train.learning_rate=1.0e-4",
]  # fmt: skip
# The loops that are measured: the keys of experiments/demo.yaml that differ, and how many blocks of how many steps. The
# loop logs every 25th step, which is one of each block of the first and takes too little to be seen in the second.
LOOPS: dict[str, tuple[list[str], int, int]] = {
    "the demo's network (width 16, 144 px, batch 8)": ([], 5, 25),
    "the report's network (width 64, 256 px, batch 1)": (WIDE, 3, 4),
}
# With every stack rendered anew: the keys of this experiment's augmentation and normalisation besides.
RENDERED = "experiments/anyscanner_volume_cpu.yaml"
PATIENTS = 4  # simulated by each scanner


class Enough(Exception):
    """Ends a loop that has been measured."""


class Watched:
    """A `lvseg.step.Step` that tells of every call before it is made."""

    def __init__(self, step: Any, before: Callable[[], None]) -> None:
        self._step, self._before = step, before

    def __call__(self, samples: Any) -> None:
        self._before()
        self._step(samples)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


def set_up(inter: int | None, intra: int | None, keep_memory: bool = True) -> None:
    """TensorFlow's threads, where None leaves its own choice, a thread a core of each kind, and its allocator."""
    import tensorflow as tf

    from lvseg import allocator

    if keep_memory:
        allocator.keep_memory()
    if inter is not None and intra is not None:
        tf.config.threading.set_inter_op_parallelism_threads(inter)
        tf.config.threading.set_intra_op_parallelism_threads(intra)


def peak_mb() -> float:
    """Peak resident memory of this process (VmHWM; the kernel counts in KiB)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure_step(
    library: str,
    steps: int,
    inter: int | None = None,
    intra: int | None = None,
    keep_memory: bool = True,
    **found: Any,
) -> Any:
    """Seconds of each bare step, the parameters and the peak memory; a message where the device cannot do it."""
    if library == "torch":
        import torch
        from steps import torch_step

        torch.set_num_threads(CORES)
        step, parameters = torch_step(**found)

        def finish() -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    else:
        import tensorflow as tf
        from steps import tensorflow_step

        set_up(inter, intra, keep_memory)
        finish = tf.test.experimental.sync_devices
        try:
            step, parameters = tensorflow_step(**found)
            step()
        except tf.errors.OpError as error:
            sentences = [line.strip() for line in error.message.splitlines() if "only supports" in line]
            return {"failed": sentences[-1] if sentences else error.message.splitlines()[0]}
    times = []
    for _ in range(WARM_UP_STEPS + steps):
        started = time.perf_counter()
        step()
        finish()
        times.append(time.perf_counter() - started)
    return {"seconds": times[WARM_UP_STEPS:], "parameters": parameters, "peak_mb": peak_mb()}


def rendering() -> list[str]:
    """The keys of `RENDERED` that have patients rendered anew at every step."""
    import yaml

    experiment = yaml.safe_load((ROOT / RENDERED).read_text())
    augment = yaml.safe_dump(experiment["augment"], default_flow_style=True, width=10**6).strip()
    return [f"augment={augment}", "data.normalise=patient", "data.clip_percentiles=[0.5, 99.5]"]


def write_cards(folder: Path) -> None:
    """Two cards of few simulated patients, like those of the demo."""
    import yaml

    for name in ("phantom_philips_volume", "phantom_ge_volume"):
        card = yaml.safe_load((ROOT / "data" / f"{name}.yaml").read_text())
        card["simulate"]["patients"] = PATIENTS
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(card))


def make_fit(folder: Path, overrides: Sequence[str]) -> Any:
    """The demo's training with these keys, which neither validates nor saves while it is measured."""
    from lvseg import devices, prepare
    from lvseg.config import load_experiment
    from lvseg.fit import Fit

    never = 10**9
    datasets = ", ".join(str(path) for path in sorted(folder.glob("*.yaml")))
    keys = [
        f"data.datasets=[{datasets}]", f"data.shards={folder / 'shards'}", f"runs={tempfile.mkdtemp(dir=folder)}",
        "data.folds=2", "data.test_fraction=0", f"train.steps={never}", f"train.validate_every={never}",
        f"train.checkpoint_every={never}",
    ]  # fmt: skip
    experiment = load_experiment(ROOT / "experiments" / "demo.yaml", [*keys, *overrides])
    cluster = devices.cluster("auto", experiment.train.batch_size)
    sets = prepare.prepare(experiment.data)
    return Fit(experiment, sets, prepare.split(experiment.data, sets), experiment.run_folder, cluster)


def run_until_enough(fit: Any, before_step: Callable[[], None]) -> None:
    """Trains until `before_step` raises Enough."""
    fit.step = Watched(fit.step, before_step)
    try:
        fit.run()
    except Enough:
        return
    raise RuntimeError("Expected a loop that goes on until it is measured, received its end.")


def measure_loop(
    folder: str,
    overrides: list[str],
    blocks: int,
    steps: int,
    augmented: bool = False,
    inter: int | None = None,
    intra: int | None = None,
) -> list[list[float]]:
    """Mean seconds of a step in blocks of so many: the bare step's, or the `augmented` one's, and the loop's in turn.

    Both run in one process, with the same threads and in the same minutes. The loop is measured from step to step, so
    that whatever it does between two of them counts; it stands still while the bare step is measured, but for the
    samples that wait for it, which are read once, in the first of the bare steps.
    """
    import tensorflow as tf

    set_up(inter, intra)
    fit = make_fit(Path(folder), overrides)
    from steps import tensorflow_step

    data, train = fit.experiment.data, fit.experiment.train
    if augmented:
        from lvseg.step import Step

        batch = next(iter(fit._batches(0)))
        bare = functools.partial(Step(fit.experiment, fit.cluster, len(fit.classes), 0.0, 1.0), batch)
    else:
        bare, _ = tensorflow_step(data.size, fit.experiment.model.width, train.batch_size, train.loss)
    for _ in range(WARM_UP_STEPS):
        bare()
    times: list[list[float]] = []
    taken, started = 0, 0.0

    def before_step() -> None:
        nonlocal taken, started
        if (taken - WARM_UP_STEPS) % steps == 0 and taken >= WARM_UP_STEPS:
            tf.test.experimental.sync_devices()
            if times:
                times[-1].append((time.perf_counter() - started) / steps)
            if len(times) == blocks:
                raise Enough
            started = time.perf_counter()
            for _ in range(steps):
                bare()
            tf.test.experimental.sync_devices()
            times.append([(time.perf_counter() - started) / steps])
            started = time.perf_counter()
        taken += 1

    run_until_enough(fit, before_step)
    return times


def prepare_shards(folder: str, overrides: list[str]) -> None:
    """Makes the shards, which a process whose memory is measured then only reads."""
    make_fit(Path(folder), overrides)


def measure_memory(folder: str, overrides: list[str], steps: int) -> float:
    """Peak memory in MB of some steps of the loop."""
    taken = 0

    def before_step() -> None:
        nonlocal taken
        if taken == steps:
            raise Enough
        taken += 1

    run_until_enough(make_fit(Path(folder), overrides), before_step)
    return peak_mb()


MEASUREMENTS = {"step": measure_step, "loop": measure_loop, "prepare": prepare_shards, "memory": measure_memory}


def measured(what: str, **found: Any) -> Any:
    """A measurement in a process of its own."""
    one = json.dumps({"what": what, **found})
    environment = {"OMP_NUM_THREADS": str(CORES)}  # PyTorch's; TensorFlow's pools do not read it
    return json.loads(run_script("training.py", "--one", one, environment=environment).splitlines()[-1])


def loop_rows(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """What pipeline, augmentation and logging add to a step."""
    result = []
    first = next(iter(LOOPS))
    overrides, blocks, steps = LOOPS[first]
    rendered = [*overrides, *rendering()], blocks, steps
    loops = {f"against the bare step, {name}": loop for name, loop in LOOPS.items()}
    loops[f"against the bare step, {first}, rendered anew at every step"] = rendered
    loops[inside := f"against the step with rendering inside, {first}"] = rendered
    for name, (overrides, blocks, steps) in loops.items():
        times = measured(
            "loop", folder=str(folder), overrides=overrides, blocks=blocks, steps=steps, augmented=name == inside
        )
        ratio = statistics.median(loop / bare for bare, loop in times)
        bare, loop = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        figure = f"{ratio:.3f} times ({loop:,.1f} ms against {bare:,.1f} ms)"
        what = f"training loop's step {name}"
        result.append(Row(what, f"at most {MOST_LOOP} times", figure, ratio <= MOST_LOOP))
    return result


def torch_rows(arguments: argparse.Namespace) -> list[Row]:
    """The bare step against PyTorch's, in processes that take turns."""
    size = {"size": 256, "width": arguments.width, "batch_size": 1}
    kinds: dict[str, dict[str, Any]] = {
        "lvseg": {"library": "tensorflow", "inter": 1, "intra": CORES},
        "torch": {"library": "torch"},
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    parameters = {}
    for _ in range(arguments.rounds):
        for kind, settings in kinds.items():
            found = measured("step", **settings, **size, steps=arguments.steps)
            seconds[kind] += found["seconds"]
            parameters[kind] = found["parameters"]
    if parameters["lvseg"] != parameters["torch"]:
        raise ValueError(f"Expected the same number of parameters, received {parameters}.")
    ours, theirs = (1e3 * statistics.median(seconds[kind]) for kind in kinds)
    what = (
        f"training step against PyTorch, channels last (width {arguments.width}, 256 px, batch 1,"
        f" {parameters['torch'] / 1e6:.2f} million parameters, {CORES} threads)"
    )
    figure = f"{ours / theirs:.2f} times ({ours:,.0f} ms against {theirs:,.0f} ms)"
    return [Row(what, f"at most {MOST_TORCH} times", figure, ours <= MOST_TORCH * theirs)]


def memory_rows(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Peak memory of the report's network."""
    measured("prepare", folder=str(folder), overrides=WIDE)
    ours = measured("memory", folder=str(folder), overrides=WIDE, steps=5)
    bare = measured("step", library="tensorflow", inter=1, intra=CORES, steps=2, **REPORT)["peak_mb"]
    theirs = measured("step", library="torch", steps=2, **REPORT)["peak_mb"]
    what = "peak memory of training (width 64, 256 px, batch 1)"
    return [
        Row(f"{what}, the loop against PyTorch's bare step", f"at most {MOST_MEMORY} times",
            f"{ours / theirs:.2f} times ({ours:,.0f} MB against {theirs:,.0f} MB)", ours <= MOST_MEMORY * theirs),
        Row(f"{what}, both bare", "", f"{bare / theirs:.2f} times ({bare:,.0f} MB against {theirs:,.0f} MB)"),
    ]  # fmt: skip


def layout_rows(arguments: argparse.Namespace) -> list[Row]:
    """The settings of the bare step, all against channels last without XLA and TensorFlow's own choice of threads."""
    size = {"size": 256, "width": arguments.layout_width, "batch_size": 1}
    plain: dict[str, Any] = {"jit_compile": False, "channels_first": False}
    settings: dict[str, dict[str, Any]] = {
        f"channels last, no XLA, threads left to TensorFlow ({CORES} inter-op, {CORES} intra-op)": plain,
        "channels last, XLA": {**plain, "jit_compile": True},
        "channels first, no XLA": {**plain, "channels_first": True},
        "channels first, XLA": {"jit_compile": True, "channels_first": True},
        f"channels last, no XLA, 1 inter-op and {CORES} intra-op threads": {**plain, "inter": 1, "intra": CORES},
        "channels last, no XLA, 1 inter-op and 1 intra-op thread": {**plain, "inter": 1, "intra": 1},
        "channels last, no XLA, threads left to TensorFlow, the C library's allocator": {**plain, "keep_memory": False},
    }
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    failed: dict[str, str] = {}
    for _ in range(arguments.rounds):
        for name in [name for name in settings if name not in failed]:
            found = measured("step", library="tensorflow", steps=arguments.steps, **size, **settings[name])
            if "failed" in found:
                failed[name] = found["failed"]
            else:
                seconds[name] += found["seconds"]
    reference = 1e3 * statistics.median(next(iter(seconds.values())))
    result = []
    for name in settings:
        what = f"training step (width {arguments.layout_width}, 256 px, batch 1) on {device()}: {name}"
        milliseconds = 1e3 * statistics.median(seconds[name]) if name not in failed else 0.0
        figure = failed.get(name) or f"{milliseconds:,.0f} ms ({milliseconds / reference:.2f} times the first)"
        result.append(Row(what, "", figure))
    return result


def device() -> str:
    """What TensorFlow computes on here, in words; looked up without starting TensorFlow in this process."""
    return run_script("training.py", "--device").splitlines()[-1]


def rows(arguments: argparse.Namespace) -> list[Row]:
    """The parts that were asked for."""
    if arguments.device:
        import tensorflow as tf

        print("the GPU" if tf.config.list_physical_devices("GPU") else "the processor")
        return []
    if arguments.one:
        found = json.loads(arguments.one)
        print(json.dumps(MEASUREMENTS[found.pop("what")](**found)))
        return []
    parts = [arguments.only] if arguments.only else PARTS
    result: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cards(folder)
        if "loop" in parts:
            result += loop_rows(folder, arguments)
        if "torch" in parts:
            result += torch_rows(arguments)
        if "memory" in parts:
            result += memory_rows(folder, arguments)
        if "layout" in parts:
            result += layout_rows(arguments)
    return result


if __name__ == "__main__":
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--only", choices=PARTS, help="one part (default: all)")
    command.add_argument("--rounds", type=int, default=3, help="processes of each kind, in turn (default: 3)")
    command.add_argument("--steps", type=int, default=6, help="steps in each process (default: 6)")
    command.add_argument("--width", type=int, default=64, help="of the network against PyTorch (default: 64)")
    command.add_argument("--layout-width", type=int, default=32, help="of the network of the settings (default: 32)")
    command.add_argument("--one", help=argparse.SUPPRESS)
    command.add_argument("--device", action="store_true", help=argparse.SUPPRESS)
    sys.exit(main(rows, command))

"""Reads mutated files one after another and says what came of each; runs in a process of its own that may crash.

Reads lines of JSON from its input, {"how", "path", "image"}, and answers each with one line. `how` is "read" or
"reference"; "crash", "hang" and "allocate" show that these are seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np

TIME_LIMIT_S = 10
# Above what the process holds once everything is imported; the files are a few kilobytes.
EXTRA_MEMORY_BYTES = 128 * 1024**2


def answer(task: dict[str, str]) -> dict[str, object]:
    from lvseg.errors import InputError
    from lvseg.formats import read_mask, read_volume

    path = Path(task["path"])
    try:
        if task["how"] == "crash":
            os.abort()
        if task["how"] == "hang":
            signal.alarm(1)
            while True:
                pass
        if task["how"] == "allocate":
            bytearray(2 * EXTRA_MEMORY_BYTES)
        if task["how"] == "reference":
            import fuzz_references

            voxels, affine = fuzz_references.read(path)
        elif task["image"]:
            mask = read_mask(path, read_volume(Path(task["image"])))
            voxels, affine = mask.voxels, mask.affine
        else:
            scan = read_volume(path)
            voxels, affine = scan.voxels, scan.affine
    except InputError as error:
        return {"error": error.code, "sentence": error.sentence}
    except Exception as error:  # the test says which exceptions it takes
        return {"exception": f"{type(error).__name__}: {error}"[:300]}
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.ascontiguousarray(voxels, np.float32)
    return {
        "shape": list(voxels.shape),
        "affine": affine.tolist(),
        "voxels": hashlib.sha256(values.tobytes()).hexdigest(),
        "finite": bool(np.isfinite(values).all()),
    }


def main() -> None:
    import fuzz_references

    from lvseg.formats import read_volume

    read_volume(Path(sys.argv[1]))  # everything is imported now
    fuzz_references.warm_up()
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + EXTRA_MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.alarm(TIME_LIMIT_S)  # nobody handles it, so it ends the process, inside a codec too
        result = answer(json.loads(line))
        signal.alarm(0)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

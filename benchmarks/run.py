"""Runs every benchmark, each in a process of its own, and prints one table.

python benchmarks/run.py                   prints it
python benchmarks/run.py --update-readme   also writes it into benchmarks/README.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from measure import JSON_PREFIX, Row, run_script, table

SCRIPTS = (
    "harmonise.py", "pipeline.py", "prepare.py", "memory.py", "phantom.py", "swap.py", "evaluation.py", "elastic.py",
    "render.py", "training.py", "shipped.py", "service.py", "load.py",
)  # fmt: skip
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def run(names: list[str]) -> str:
    """The table of these scripts, with when and where it was measured."""
    rows: list[Row] = []
    started = time.monotonic()
    for name in names:
        print(f"running {name} ...", flush=True)
        try:
            output = run_script(name, "--json")
        except subprocess.CalledProcessError as error:
            rows.append(Row(name, "runs to its end", f"exit code {error.returncode}", False))
            continue
        (line,) = (line for line in output.splitlines() if line.startswith(JSON_PREFIX))
        rows += [Row(**row) for row in json.loads(line.removeprefix(JSON_PREFIX))]
    minutes = (time.monotonic() - started) / 60
    where = f"{_processor()}, {len(os.sched_getaffinity(0))} cores"
    heading = (
        f"{datetime.date.today().isoformat()}, {where}, Python {platform.python_version()}; {minutes:.0f} minutes."
    )
    return f"{heading}\n\n{table(rows)}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def update_readme(text: str, path: Path = README) -> None:
    """Puts the table between the README's markers."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=list(SCRIPTS), metavar="SCRIPT", help="default: all")
    parser.add_argument("--update-readme", action="store_true", help="write the table into benchmarks/README.md")
    arguments = parser.parse_args()
    text = run(arguments.scripts)
    print(f"\n{text}")
    if arguments.update_readme:
        update_readme(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Processor seconds of cold commands in two commits, in turns: `lowrank data` and `lowrank plan`.

python -m benchmarks.cold_commands COMMIT [--rounds 5] [--json FILE]

COMMIT is checked out beside this tree. Every command is a process of its own on 2,000 rows and the base that ships with
lowrank; the first of each is not counted, after which compiled modules lie beside their sources, as they do where
lowrank is installed. What counts is the ratio of each round, and the median of them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.earlier_commit import HERE, checked_out
from benchmarks.machine import describe, load

COMMANDS = ("data", "plan")
ROWS = 2000
SETTINGS = """\
model: lowrank/tiny
data: {train: [rows.json], batch_size: 8}
max_steps: 10
output_dir: run
"""


def processor_seconds(tree: Path, command: str, folder: Path) -> float:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "lowrank", command, "run.yaml"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"lowrank {command} of {tree}:\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {command: {"before": [], "after": []} for command in COMMANDS}
    with (
        tempfile.TemporaryDirectory() as place,
        checked_out(options.commit, Path(place) / "before") as before,
    ):
        folder = Path(place)
        rows = [
            {"instruction": f"Add {n} and {n % 7}.", "input": "", "output": f"It is {n + n % 7}."} for n in range(ROWS)
        ]
        (folder / "rows.json").write_text(json.dumps(rows))
        (folder / "run.yaml").write_text(SETTINGS)
        for turn in range(options.rounds + 1):
            for command in COMMANDS:
                for side, tree in (("before", before), ("after", HERE)):
                    seconds = processor_seconds(tree, command, folder)
                    if turn:
                        found[command][side].append(seconds)
    for command, sides in found.items():
        ratios = [after / before for before, after in zip(sides["before"], sides["after"])]
        middles = " and ".join(f"{statistics.median(seconds):.2f}" for seconds in sides.values())
        print(
            f"lowrank {command}: {statistics.median(ratios):.2f} of {options.commit} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}); processor seconds {middles}"
        )
    print(f"load {load()}")
    if options.json:
        options.json.write_text(
            json.dumps({"machine": describe("cpu"), "commit": options.commit, "seconds": found}, indent=1)
        )


if __name__ == "__main__":
    main()

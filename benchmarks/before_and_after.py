"""The same work by two commits, in turns: whether a change costs anything where it is not used.

python -m benchmarks.before_and_after COMMIT [--rounds 6] [--layers 4] [--steps 4] [--json FILE]

COMMIT is checked out beside this tree; each side trains by its own `benchmarks.contender_lowrank` in a process of its
own. What counts is processor time of steps, the first of a process left out: the ratio of each round, and the median of
them. Losses are compared, too. For what ranks cost a run of one process, COMMIT is 0bd7e6b, the last one without them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import workload
from benchmarks.earlier_commit import HERE, checked_out
from benchmarks.machine import load


def run(tree: Path, spec: Path, result: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.contender_lowrank", str(spec), str(result)]
    subprocess.run(command, check=True, cwd=tree, env=environment)
    return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"before": [], "after": []}
    losses: dict[str, list[float]] = {}
    loads = []
    with (
        tempfile.TemporaryDirectory() as place,
        checked_out(options.commit, Path(place) / "before") as before,
    ):
        folder = Path(place)
        # a small vocabulary: the head's products would be most of a step of few layers
        work = workload.prepare(folder / "work", None, 64, {"num_hidden_layers": options.layers, "vocab_size": 8192})
        spec = {
            "folder": str(folder / "work"),
            "steps": work.packed(options.tokens)[: options.steps + 1],
            "device": "cpu",
            "rank": 16,
            "learning_rate": 2e-4,
            "micro_batch_tokens": options.tokens,
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        for number in range(options.rounds):
            sides = (("before", before), ("after", HERE))
            for name, tree in sides[:: 1 if number % 2 else -1]:
                steps = run(tree, folder / "spec.json", folder / "result.json")["steps"]
                seconds[name].append(statistics.median(step["cpu_seconds"] for step in steps[1:]))
                losses[name] = [step["loss"] for step in steps]
                loads.append(load())
    ratios = [after / before for before, after in zip(seconds["before"], seconds["after"])]
    found = {
        "commit": options.commit,
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(each, 4) for each in ratios],
        "processor_seconds_a_step": {name: [round(each, 4) for each in own] for name, own in seconds.items()},
        "losses_are_equal": losses["before"] == losses["after"],
        "losses": losses,
        "load": [min(loads), statistics.median(loads), max(loads)],
        "torch": torch.__version__,
    }
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

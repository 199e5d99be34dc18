"""How long until something happens: imports, `lowrank --help`, from the command to the first training step.

python -m benchmarks.startup
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, load, median_of

IMPORTS = {
    "import lowrank": "import lowrank",
    "import torch": "import torch",
    "import transformers": "import transformers",
    "the modules of a lowrank run": "import lowrank.pipelines.train",
    "the modules of a TRL run": "from trl import SFTConfig, SFTTrainer; from peft import LoraConfig, get_peft_model",
}
CONFIG = """\
model: lowrank/tiny
data: {train: [lowrank/demo], max_samples: 64}
max_steps: 2
logging_steps: 1
"""


def seconds(command: list[str], times: int) -> list[float]:
    """Wall seconds of a command in fresh processes; the first run warms the disk cache and is not counted."""
    taken = []
    for _ in range(times + 1):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        taken.append(time.perf_counter() - started)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    return taken[1:]


def first_step(times: int) -> list[float]:
    """From `lowrank train` to the first step on the base that ships with the package."""
    taken = []
    for _ in range(times + 1):
        with tempfile.TemporaryDirectory() as name:
            config = Path(name) / "run.yaml"
            config.write_text(CONFIG + f"output_dir: {name}/run\n")
            taken.append(_until_step([sys.executable, "-m", "lowrank", "train", str(config), "--json"]))
    return taken[1:]


def _until_step(command: list[str]) -> float:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found, line = None, ""
    for line in process.stdout:  # to the end, or the run would stop at a full pipe
        if found is None and '"loss"' in line:
            found = time.perf_counter() - started
    process.wait()
    if found is None or process.returncode:
        raise SystemExit(f"no step; the last it said: {line}")
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    taken = {name: seconds([sys.executable, "-c", code], options.times) for name, code in IMPORTS.items()}
    taken["lowrank --help"] = seconds([sys.executable, "-m", "lowrank", "--help"], options.times)
    taken["lowrank train to the first step, lowrank/tiny"] = first_step(options.times)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": describe("cpu"),
        "load": load(),
        "seconds": {name: {"median": median_of(each), "all": each} for name, each in taken.items()},
    }
    for name, each in result["seconds"].items():
        print(f"{name:50s} {each['median']:.2f} s")
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"startup_{result['date'][:10]}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

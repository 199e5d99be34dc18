"""N jobs in one process against N single runs, one after another.

    python -m benchmarks.jobs_in_one_process --data alpaca_en_demo.json --tokens 128

Both train the same adapters on the same rows. Each single run is a process of its own, as a sweep is done otherwise.
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

import torch

from benchmarks import workload
from benchmarks.machine import describe, median_of
from lowrank.kernels.glibc_malloc import without_cache

LEARNING_RATE = 2e-4
SAME_LOSS = 1e-2
"""bf16: the products of eight jobs are blocked otherwise than those of one, so losses agree to rounding."""


def steps_of(work: workload.Workload, job: int, num_jobs: int, tokens: int, num_steps: int) -> list[list[int]]:
    """Row numbers of a job's steps: its own rows, of those that fit, as many as have `tokens` together."""
    length = [len(row.tokens) for row in work.rows]
    own = iter([row for row in range(job, len(length), num_jobs) if length[row] <= tokens])
    steps: list[list[int]] = [[] for _ in range(num_steps)]
    for step in steps:
        while sum(length[row] for row in step) < 0.75 * tokens:
            step.append(next(own))
    return steps


def run(jobs: dict[str, Any], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """These jobs in a fresh process; with the seconds from its start to its end."""
    spec = {
        "folder": str(folder),
        "device": options.device,
        "rank": options.rank,
        "learning_rate": LEARNING_RATE,
        "micro_batch_tokens": options.micro_batch_tokens,
        "storage": options.storage,
        "activation_checkpointing": options.activation_checkpointing,
        "jobs": jobs,
    }
    given, result = folder / "spec.json", folder / "result.json"
    given.write_text(json.dumps(spec))
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.contender_jobs", str(given), str(result)],
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", **without_cache()},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return {**json.loads(result.read_text()), "whole_seconds": time.perf_counter() - started}


def compare(together: dict[str, Any], alone: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of one size. Refuses if a job learned otherwise in company."""
    losses = {seed: each for one in alone for seed, each in one["losses"].items()}
    differences = [
        abs(one - other) / abs(other) for seed in losses for one, other in zip(together["losses"][seed], losses[seed])
    ]
    if max(differences) > SAME_LOSS:
        raise SystemExit(f"a job's loss differs by {max(differences):.1%} from its single run")
    found: dict[str, Any] = {"largest_difference_of_a_loss": max(differences)}
    for key in ("seconds", "cpu_seconds"):
        # The first step compiles kernels and takes memory for the first time; a sweep pays that N times, but a long
        # run hardly notices it.
        one_after_another = sum(median_of([step[key] for step in one["steps"][1:]]) for one in alone)
        found[f"step_{key}_together"] = median_of([step[key] for step in together["steps"][1:]])
        found[f"step_{key}_one_after_another"] = one_after_another
    found["tokens_of_a_step"] = median_of([step["tokens"] for step in together["steps"]])
    found["whole_seconds_together"] = together["whole_seconds"]
    found["whole_seconds_one_after_another"] = sum(one["whole_seconds"] for one in alone)
    found["peak_memory_bytes_together"] = together["peak_memory_bytes"]
    found["peak_memory_bytes_of_one"] = max(one["peak_memory_bytes"] for one in alone)
    found["memory_less_than_as_many_processes"] = 1 - together["peak_memory_bytes"] / sum(
        one["peak_memory_bytes"] for one in alone
    )
    found["load"] = median_of([step["load"] for one in (together, *alone) for step in one["steps"]])
    return found


def main() -> None:
    """Prepare, run, write."""
    options = _options()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": describe(options.device),
        "jobs": options.jobs,
        "steps": options.steps,
        "storage": options.storage,
        "layers": options.layers,
        "rank": options.rank,
        "micro_batch_tokens": options.micro_batch_tokens,
        "activation_checkpointing": options.activation_checkpointing,
        "sizes": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = workload.prepare(folder, options.data, 999, {"num_hidden_layers": options.layers})
        result["rows"] = work.source
        for tokens in options.tokens:
            jobs = {str(job): steps_of(work, job, options.jobs, tokens, options.steps) for job in range(options.jobs)}
            together = run(jobs, folder, options)
            alone = [run({seed: steps}, folder, options) for seed, steps in jobs.items()]
            found = {"tokens_per_job_and_step": tokens, **compare(together, alone)}
            result["sizes"].append(found)
            print(json.dumps(found, indent=1), flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    packed = "" if options.storage == "dense" else f"_{options.storage}"
    packed += "" if options.activation_checkpointing == "none" else f"_recompute-{options.activation_checkpointing}"
    stem = f"jobs_in_one_process{packed}_rank-{options.rank}_{options.threads}-threads_{result['date'][:10]}"
    (options.results / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an alpaca json file; without it rows are synthesised")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024], help="per job and step")
    parser.add_argument("--storage", default="dense", help="how the base is kept: dense, nf4, int8 ...")
    parser.add_argument("--activation-checkpointing", default="none", help="model.activation_checkpointing, of both")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()

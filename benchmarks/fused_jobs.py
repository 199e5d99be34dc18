"""Jobs in the same passes against the same jobs one after another, on one base in one process: what fusing pays.

    python -m benchmarks.fused_jobs RESULT.json [--jobs 1 2 4 8 16 32] [--tokens 64 256 1024] [--storages dense nf4]

A round is one optimizer step of N jobs: once all in one step of the engine, once a step for each. Rounds alternate, by
processor time; the ratio is of medians. The model has the widths of Qwen2.5-0.5B, fewer layers, and a vocabulary that
is as much smaller, so that layers and head have the shares they have there. Points that would take more than
`--seconds` are not run, and stand as null.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import workload
from benchmarks.contender_lowrank import engine_of
from benchmarks.machine import describe
from lowrank.kernels.glibc_malloc import keep_freed_memory
from lowrank.planning.fusing import fitted
from lowrank.segments import Segment, number_the_step
from lowrank.train.engine import Engine

LEARNED = 0.85
"""Of the tokens, as in the rows of the other benchmarks."""
DOCUMENT = 256
"""Tokens of the longest document."""


def segments_of(job: int, tokens: int, vocabulary: int) -> list[Segment]:
    """Documents of random tokens, `tokens` together."""
    generator = np.random.default_rng(job)
    found = []
    for length in [DOCUMENT] * (tokens // DOCUMENT) or [tokens]:
        weight_L = (np.arange(length) >= (1 - LEARNED) * length).astype(np.float32)
        found.append(Segment(generator.integers(3, vocabulary, length).astype(np.int64), weight_L))
    return number_the_step(found)


def step(engine: Engine, work: dict[int, list[Segment]], together: bool) -> float:
    """Processor seconds of one optimizer step of every job."""
    started = time.process_time()
    for part in [work] if together else [{slot: own} for slot, own in work.items()]:
        forwarded = engine.forward_backward(part)
        assert all(np.isfinite(each.loss) for each in forwarded.values())
        for slot in part:
            assert engine.optim_step(slot, 1e-4).grad_norm > 0
    return time.process_time() - started


def point(
    engine: Engine, slots: list[int], tokens: int, rounds: int, most: float, vocabulary: int
) -> dict[str, Any] | None:
    """Medians of one number of jobs and tokens; None where it would take too long."""
    work = {slot: segments_of(place, tokens, vocabulary) for place, slot in enumerate(slots)}
    first = step(engine, {slots[0]: work[slots[0]]}, together=True)
    if 2 * first * len(slots) * (rounds + 1) > most:
        return None
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 1):
        for together in (True, False) if number % 2 else (False, True):
            seconds[together].append(step(engine, work, together))
    fused, alone = (statistics.median(seconds[together][1:]) for together in (True, False))
    return {"fused_cpu_seconds": fused, "one_after_another_cpu_seconds": alone, "times_faster": alone / fused}


def checked(points: list[dict[str, Any]], micro_batch_tokens: int) -> dict[str, Any]:
    """The model of `lowrank plan` (planning/fusing.py), fitted to three points of each storage, on all others."""
    found = {}
    for storage in {each["storage"]: None for each in points}:
        known = {
            (each["jobs"], each["tokens"]): each["measured"]
            for each in points
            if each["storage"] == storage and each["measured"]
        }
        few, many = min(tokens for _, tokens in known), max(tokens for jobs, tokens in known if jobs == 1)
        company = max((jobs for jobs, tokens in known if tokens == few and jobs <= 8), default=1)
        if (1, few) not in known or few == many or company == 1:
            continue
        seconds = {key: each["fused_cpu_seconds"] for key, each in known.items()}
        model = fitted(
            (few, seconds[1, few]), (many, seconds[1, many]), (company, company * few, seconds[company, few])
        )
        used = {(1, few), (1, many), (company, few)}
        others = [
            {
                "jobs": jobs,
                "tokens": tokens,
                "times_faster": known[jobs, tokens]["times_faster"],
                "predicted": model.times_faster([tokens] * jobs, micro_batch_tokens),
            }
            for jobs, tokens in known
            if (jobs, tokens) not in used and jobs > 1
        ]
        errors = [abs(each["predicted"] / each["times_faster"] - 1) for each in others]
        found[storage] = {"fitted": vars(model), "largest_error": max(errors, default=None), "others": others}
    return found


def main() -> None:
    """Every storage, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--storages", nargs="+", default=["dense", "nf4"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=120.0)
    given = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    vocabulary = workload.QWEN_05B["vocab_size"] * given.layers // workload.QWEN_05B["num_hidden_layers"]
    shape = {"num_hidden_layers": given.layers, "vocab_size": vocabulary}
    named = {name: getattr(given, name) for name in ("layers", "rank", "rounds", "micro_batch_tokens")}
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": describe("cpu"), **named, "points": []}
    with tempfile.TemporaryDirectory() as name:
        work = workload.prepare(Path(name), None, 40, shape)
        for storage in given.storages:
            seeds = list(range(max(given.jobs)))
            engine, slots = engine_of(work.model, "cpu", seeds, given.rank, given.micro_batch_tokens, storage)
            result["dtype"] = str(engine.base.dtype).removeprefix("torch.")
            for tokens in given.tokens:
                for jobs in given.jobs:
                    found = point(engine, slots[:jobs], tokens, given.rounds, given.seconds, vocabulary)
                    result["points"].append({"storage": storage, "jobs": jobs, "tokens": tokens, "measured": found})
                    result["model"] = checked(result["points"], given.micro_batch_tokens)
                    given.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                    shown = "not run" if found is None else f"{found['times_faster']:.2f}"
                    print(f"{storage}, {jobs} jobs of {tokens} tokens: {shown}", flush=True)


if __name__ == "__main__":
    main()

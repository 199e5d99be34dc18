"""Some jobs on one base, in a process of its own: `python -m benchmarks.contender_jobs SPEC.json RESULT.json`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.contender_lowrank import engine_of, segments
from benchmarks.machine import load, peak_memory, wait
from lowrank.kernels.glibc_malloc import keep_freed_memory
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Train the jobs of `spec` (seed to the row numbers of each step), all in the same steps; what was measured."""
    keep_freed_memory()
    work = workload.read(Path(spec["folder"]))
    seeds = [int(seed) for seed in spec["jobs"]]
    storage = spec.get("storage", "dense")
    engine, slots = engine_of(work.model, spec["device"], seeds, spec["rank"], spec["micro_batch_tokens"], storage)
    set_activation_checkpointing(engine.base.model, spec.get("activation_checkpointing", "none"))
    after_load = peak_memory()
    losses: dict[str, list[float]] = {seed: [] for seed in spec["jobs"]}
    steps = []
    for numbers in zip(*spec["jobs"].values()):
        started, started_cpu = time.perf_counter(), time.process_time()
        forwarded = engine.forward_backward({slot: segments(work, rows) for slot, rows in zip(slots, numbers)})
        norms = [engine.optim_step(slot, spec["learning_rate"]).grad_norm for slot in slots]
        wait(spec["device"])
        steps.append(
            {
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - started_cpu,
                "tokens": sum(each.tokens for each in forwarded.values()),
                "load": load(),
            }
        )
        assert all(norm > 0 for norm in norms), norms
        for seed, slot in zip(spec["jobs"], slots):
            losses[seed].append(forwarded[slot].loss)
    return {"steps": steps, "losses": losses, "peak_memory_bytes": peak_memory(), "after_load_bytes": after_load}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))

"""One run of lowrank, in a process of its own: `python -m benchmarks.contender_lowrank SPEC.json RESULT.json`.

What `lowrank.pipelines.train.train` does without the data room and the run folder: load, adapter, engine, steps.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import workload
from benchmarks.machine import load, peak_memory, wait
from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.kernels.glibc_malloc import keep_freed_memory
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load as load_base
from lowrank.models.storages.packed import PackedLinear
from lowrank.objectives.sft import SFTConfig
from lowrank.segments import Segment, number_the_step
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig


def engine_of(
    model: str,
    device: str,
    seeds: list[int],
    rank: int,
    micro_batch_tokens: int,
    storage: str = "dense",
    dtype: str = "auto",
) -> tuple[Engine, list[int]]:
    """An engine with one SFT job for each seed, adapters on all linear layers; and the jobs' slots.

    `storage`: model.storage, or `nf4, dequantized`: the weights that nf4 leaves, dense.
    """
    name, _, dequantized = storage.partition(", ")
    base = load_base(ModelConfig(path=model, device=device, dtype=dtype, storage={"type": name}))  # type: ignore[arg-type]
    if dequantized:
        unpack(base.model)
    engine = Engine(base, Bank(base), micro_batch_tokens)
    slots = []
    for seed in seeds:
        slots.append(engine.bank.add(LoraConfig(rank=rank), seed=seed))
        engine.add(slots[-1], SFTConfig().build(), AdamWConfig(), seed, 0.0)
    return engine, slots


def unpack(model: torch.nn.Module) -> None:
    """Every packed layer becomes a dense one with the same weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain = plain.to(module.dtype).requires_grad_(False)
            plain.weight.copy_(module.dense_weight())
            if module.bias is not None:
                plain.bias.copy_(module.bias)
            model.set_submodule(name, plain)


def segments(work: workload.Workload, numbers: list[int]) -> list[Segment]:
    """Rows as the segments of one optimizer step."""
    rows = [work.rows[number] for number in numbers]
    return number_the_step([Segment(np.array(row.tokens), np.array(row.learned, np.float32)) for row in rows])


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Train the steps of `spec`; what was measured."""
    if spec.get("keep_freed_memory", True):
        keep_freed_memory()
    work = workload.read(Path(spec["folder"]))
    storage = spec.get("storage", "dense")
    size, dtype = spec["micro_batch_tokens"], spec.get("dtype", "auto")
    engine, (slot,) = engine_of(work.model, spec["device"], [0], spec["rank"], size, storage, dtype)
    set_activation_checkpointing(engine.base.model, spec.get("activation_checkpointing", "none"))
    after_load = peak_memory()
    steps = []
    for numbers in spec["steps"]:
        step = segments(work, numbers)
        if spec.get("evaluate"):
            engine.evaluate({slot: step})
        started, started_cpu = time.perf_counter(), time.process_time()
        forwarded = engine.forward_backward({slot: step})[slot]
        updated = engine.optim_step(slot, spec["learning_rate"])
        wait(spec["device"])
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
        steps.append(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "tokens": forwarded.tokens,
                "loss": forwarded.loss,
                "grad_norm": updated.grad_norm,
                "load": load(),
            }
        )
    peak = torch.cuda.max_memory_allocated() if spec["device"] == "cuda" else peak_memory()
    config = {
        "dtype": str(engine.base.dtype),
        "layout": engine.base.layout,
        "micro_batch_tokens": spec["micro_batch_tokens"],
        "keep_freed_memory": spec.get("keep_freed_memory", True),
        "adapter": LoraConfig(rank=spec["rank"]).model_dump(mode="json"),
        "optimizer": AdamWConfig(learning_rate=spec["learning_rate"]).model_dump(mode="json"),
    }
    config |= {"storage": storage, "activation_checkpointing": spec.get("activation_checkpointing", "none")}
    return {"steps": steps, "peak_memory_bytes": peak, "after_load_bytes": after_load, "config": config}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))

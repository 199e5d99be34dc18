"""Training: tokens per second, peak memory, share of the products' own rate; beside TRL, on the same rows, in turns."""

from __future__ import annotations

import gc
import importlib.util
import math
import statistics
import time
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_day.cells import CELLS, LEARNING_RATE, RANK, STEPS, Cell
from benchmarks.gpu_day.day import Day
from benchmarks.gpu_day.device import ran_out
from benchmarks.gpu_day.peers import again, theirs, twin_of, unchanged
from benchmarks.gpu_day.shapes import bank_of, base_of, make_model
from benchmarks.machine import gemm_limit
from benchmarks.workload import Row
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.errors import ModelError
from lowrank.models.base import Base
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.objectives.sft import SFTConfig
from lowrank.segments import Segment, number_the_step
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig


def measure(day: Day) -> None:
    """All cells the section's time reaches; models are made once and kept while neighbors share them."""
    made: dict[str, Any] = {}
    shapes = list(dict.fromkeys(cell.shape for cell in CELLS))
    for cell in sorted(CELLS[: day.cells], key=lambda cell: shapes.index(cell.shape)):
        if day.over():
            day.note(f"no time for {cell}")
            continue
        if (cell.shape, cell.storage) != made.get("of"):
            made.clear()
            free()
            made = {"of": (cell.shape, cell.storage), "model": make_model(cell.shape, day.device, day.tiny, day.dtype)}
            made["twin"] = twin_of(made["model"], cell.storage)
            made["base"] = base_of(made.pop("model"), cell.shape, cell.storage)
        day.add("training", one_cell(day, cell, made["base"], made["twin"]))
    made.clear()
    free()


def one_cell(day: Day, cell: Cell, base: Base, twin: Any) -> dict[str, Any]:
    """Ours and, where asked, TRL, in turns on the same rows."""
    tokens, document = (min(cell.tokens, 64), min(cell.document, 32)) if day.tiny else (cell.tokens, cell.document)
    rows = rows_of(base.model.config.vocab_size, cell.jobs * STEPS, tokens, document)
    found: dict[str, Any] = {"cell": vars(cell), "device": day.device.name, "layout": base.layout}
    turns: dict[str, list[dict[str, Any]]] = {"lowrank": []}
    if cell.peers and day.peers and twin is not None:
        turns["trl"] = []
    if "trl" in turns and cell.storage == "dense" and day.device.is_gpu and importlib.util.find_spec("liger_kernel"):
        turns["trl_liger"] = []
    for _ in range(2 if len(turns) > 1 else 1):
        for who, each in turns.items():
            if day.over() and each:
                continue
            free()
            day.device.forget_peak()
            try:
                with unchanged(base.model):
                    each.append(
                        ours(day, cell, base, rows) if who == "lowrank" else theirs(day, cell, again(twin), rows, who)
                    )
            except (RuntimeError, ModelError, ValueError, ImportError) as error:
                if day.tiny:
                    raise
                each.append({"failed": "out of memory" if ran_out(error) else f"{type(error).__name__}: {error}"[:500]})
    found["turns"] = turns
    best = {who: speed for who, each in turns.items() if (speed := median_speed(each))}
    found["tokens_per_second"] = best
    found["faster_by"] = {who: best["lowrank"] / speed for who, speed in best.items() if "lowrank" in best}
    if "lowrank" in best:
        limit = limit_of(day, base, min(tokens, 4096))
        found["products_flops_per_second"] = limit["flops_per_second"]
        per_token = 4.0 * products_per_token(base)
        if cell.recompute == "full":
            per_token *= 1.5
        found["share_of_products"] = best["lowrank"] * per_token / limit["flops_per_second"]
    return found


def rows_of(vocabulary: int, steps: int, tokens: int, document: int) -> list[list[Row]]:
    """Steps of documents of random tokens and lengths that fill `tokens` exactly; all of an answer is learned."""
    generator = np.random.default_rng(0)
    made = []
    for _ in range(steps):
        step, left = [], tokens
        while left:
            length = min(left, document if document == tokens else int(generator.integers(document // 4, document + 1)))
            learned = [int(place >= length // 4) for place in range(length)]
            step.append(Row(generator.integers(3, vocabulary, length).tolist(), learned))
            left -= length
        made.append(step)
    return made


def segments_of(step: list[Row]) -> list[Segment]:
    return number_the_step([Segment(np.array(row.tokens), np.array(row.learned, np.float32)) for row in step])


def ours(day: Day, cell: Cell, base: Base, rows: list[list[Row]]) -> dict[str, Any]:
    """The engine over the shared base; adapters come and go."""
    set_activation_checkpointing(base.model, "none" if day.tiny and cell.recompute == "offload" else cell.recompute)
    engine = Engine(base, bank_of(base), cell.jobs * cell.tokens)
    for seed in range(cell.jobs):
        slot = engine.bank.add(LoraConfig(rank=RANK), seed=seed)
        engine.add(slot, SFTConfig().build(), AdamWConfig(learning_rate=LEARNING_RATE), seed, 0.0)
    steps = []
    try:
        for step in range(STEPS):
            work = {slot: segments_of(rows[STEPS * slot + step]) for slot in engine.jobs}
            before, started = day.device.allocations(), clock(day)
            forwarded = engine.forward_backward(work)
            norms = [engine.optim_step(slot, LEARNING_RATE).grad_norm for slot in engine.jobs]
            seconds = clock(day) - started
            tokens = sum(each.tokens for each in forwarded.values())
            losses = [each.loss for each in forwarded.values()]
            if not all(norm > 0 and math.isfinite(norm + loss) for norm, loss in zip(norms, losses)):
                raise ValueError(f"step {step} learns nothing: losses {losses}, gradient norms {norms}")
            steps.append({"seconds": seconds, "tokens": tokens, "loss": losses, "grad_norm": norms})
            steps[-1]["device_allocations"] = day.device.allocations() - before
    finally:
        set_activation_checkpointing(base.model, "none")
    return {"steps": steps, "peak_memory_bytes": day.device.peak()}


def median_speed(turns: list[dict[str, Any]]) -> float | None:
    """Tokens per second over the counted steps of all turns that went well."""
    counted = [step for turn in turns for step in turn.get("steps", [])[1:]]
    return statistics.median(step["tokens"] / step["seconds"] for step in counted) if counted else None


def products_per_token(base: Base) -> int:
    """Weights a token is multiplied with: of a mixture, those of its experts; of the head, all."""
    config = base.model.config
    experts, chosen = getattr(config, "num_experts", None), getattr(config, "num_experts_per_tok", None)
    total = 0
    for name, shape in frozen_shapes(base).items():
        share = chosen / experts if experts and chosen and ".experts" in name else 1.0
        total += int(share * shape)
    return total


def frozen_shapes(base: Base) -> dict[str, int]:
    """Elements of every matrix of the model, but for the embedding."""
    embedding = base.model.get_input_embeddings()
    found: dict[str, int] = {}
    for name, module in base.model.named_modules():
        if module is embedding:
            continue
        own = getattr(module, "out_features", 0) * getattr(module, "in_features", 0)
        if own and not name.endswith(".base"):
            found[name] = own
        for key, value in module.named_parameters(recurse=False):
            if value.ndim == 3:  # fused experts
                found[f"{name}.{key}"] = value.numel()
    return found


def limit_of(day: Day, base: Base, tokens: int) -> dict[str, Any]:
    """The rate of the model's own products by themselves, at this height, now."""
    config = base.model.config
    width, wide = config.hidden_size, getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    shapes = {(width, width): 2, (wide, width): 2, (width, wide): 1}
    return gemm_limit(shapes, tokens, day.device.name, times=3, dtype=day.dtype)


def clock(day: Day) -> float:
    day.device.wait()
    return time.perf_counter()


def free() -> None:
    """What nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

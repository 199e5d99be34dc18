"""One step under torch's profiler: which kernels take the time, how many are launched, how long the device waits."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_day.cells import LEARNING_RATE, RANK
from benchmarks.gpu_day.day import Day
from benchmarks.gpu_day.shapes import bank_of, base_of, make_model
from benchmarks.gpu_day.training import free, rows_of, segments_of
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.objectives.sft import SFTConfig
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig

CELLS = (("Llama-3.1-8B", "nf4", 1, 2048), ("0.5B", "dense", 8, 512))

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
KEPT = 20
"""Kernels and gaps that are told."""


def measure(day: Day) -> None:
    """The third step of each cell."""
    for shape, storage, jobs, tokens in CELLS[: day.cells]:
        if day.over():
            return day.note("no time for more profiles")
        tokens = min(tokens, 64) if day.tiny else tokens
        base = base_of(make_model(shape, day.device, day.tiny, day.dtype), shape, storage)
        engine = Engine(base, bank_of(base), jobs * tokens)
        for seed in range(jobs):
            slot = engine.bank.add(LoraConfig(rank=RANK), seed=seed)
            engine.add(slot, SFTConfig().build(), AdamWConfig(), seed, 0.0)
        rows = rows_of(base.model.config.vocab_size, 1, tokens, min(tokens, 512))[0]

        def step(engine: Engine = engine, rows: list = rows) -> None:
            engine.forward_backward({slot: segments_of(rows) for slot in engine.jobs})
            for slot in engine.jobs:
                engine.optim_step(slot, LEARNING_RATE)

        step()
        step()
        day.device.wait()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if day.device.is_gpu else [])]
        started = time.perf_counter()
        with profile(activities=activities) as watched:
            step()
            day.device.wait()
        seconds = time.perf_counter() - started
        found = on_device(watched.events()) if day.device.is_gpu else on_processor(watched.key_averages())
        named = Counter(event.name for event in watched.events())
        day.add(
            "profiles",
            {"shape": shape, "storage": storage, "jobs": jobs, "tokens": tokens, "seconds": seconds,
             "busy_share": found.pop("busy_seconds") / seconds, "launches": sum(named[name] for name in LAUNCHES),
             "synchronizations": sum(times for name, times in named.items() if "Synchronize" in name), **found},
        )  # fmt: skip
        del base, engine
        free()
    return None


def on_device(events: Iterable[Any]) -> dict[str, Any]:
    """`busy_seconds` in which at least one kernel (or copy) ran, the kernels that took longest, the longest gaps.

    Of what ran on the device itself: an operator on the host carries the time of the kernels it launched once more, and
    an annotation spans those inside it.
    """
    ran = [each for each in events if each.device_type == DeviceType.CUDA and not each.is_user_annotation]
    taken: dict[str, list[float]] = {}
    gaps = []
    busy = end = 0.0
    last = ""
    for each in sorted(ran, key=lambda each: each.time_range.start):
        time_range = each.time_range
        taken.setdefault(each.name, []).append(time_range.end - time_range.start)
        if last and time_range.start > end:
            gaps.append({"seconds": (time_range.start - end) / 1e6, "after": last, "before": each.name[:120]})
        busy += max(0.0, time_range.end - max(end, time_range.start)) if last else time_range.end - time_range.start
        if not last or time_range.end > end:  # streams overlap: a gap follows the one that ends last
            end, last = time_range.end, each.name[:120]
    top = sorted(taken.items(), key=lambda item: -sum(item[1]))[:KEPT]
    return {
        "busy_seconds": busy / 1e6,
        "top": [{"name": name[:120], "count": len(each), "seconds": sum(each) / 1e6} for name, each in top],
        "gaps": sorted(gaps, key=lambda gap: -gap["seconds"])[:KEPT],
        "gap_seconds": sum(gap["seconds"] for gap in gaps),
    }


def on_processor(averages: Iterable[Any]) -> dict[str, Any]:
    """In a rehearsal: operators, which have no gaps between them."""
    top = sorted(averages, key=lambda event: -event.self_cpu_time_total)
    shown = [{"name": each.key[:120], "count": each.count, "seconds": each.self_cpu_time_total / 1e6} for each in top]
    return {"busy_seconds": sum(each["seconds"] for each in shown), "top": shown[:KEPT], "gaps": [], "gap_seconds": 0.0}

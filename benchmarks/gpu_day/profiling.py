"""One step under torch's profiler: which kernels take the time, how many are launched, how long the device waits."""

from __future__ import annotations

import time

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_day.day import Day
from benchmarks.gpu_day.shapes import bank_of, base_of, make_model
from benchmarks.gpu_day.training import LEARNING_RATE, RANK, free, rows_of, segments_of
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.objectives.sft import SFTConfig
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig

CELLS = (("Llama-3.1-8B", "nf4", 1, 2048), ("0.5B", "dense", 8, 512))


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
        events = watched.key_averages()
        busy = (
            (lambda event: event.self_device_time_total)
            if day.device.is_gpu
            else (lambda event: event.self_cpu_time_total)
        )
        top = sorted(events, key=busy, reverse=True)[:20]
        launches = sum(
            event.count
            for event in events
            if event.key in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
        )
        waits = sum(event.count for event in events if "Synchronize" in event.key)
        day.add(
            "profiles",
            {"shape": shape, "storage": storage, "jobs": jobs, "tokens": tokens, "seconds": seconds,
             "busy_share": sum(map(busy, events)) / 1e6 / seconds, "launches": launches, "synchronizations": waits,
             "top": [{"name": event.key[:120], "count": event.count, "seconds": busy(event) / 1e6} for event in top]},
        )  # fmt: skip
        del base, engine
        free()
    return None

"""Answering: tokens per second for 1, 16 and 64 adapters in the same steps, and through compiled layers."""

from __future__ import annotations

import numpy as np

from benchmarks.gpu_day.cells import RANK
from benchmarks.gpu_day.day import Day
from benchmarks.gpu_day.shapes import bank_of, base_of, make_model
from benchmarks.gpu_day.training import clock, free
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.generate.compiled_decoding import CompiledDecoding
from lowrank.generate.generator import Generator, GeneratorConfig
from lowrank.generate.request import GenerationConfig, Prompt

ADAPTERS = (1, 16, 64)
CELLS = (("0.5B", "dense"), ("Llama-3.1-8B", "nf4"))


def measure(day: Day) -> None:
    """64 answers at once; prompts of 20 to 200 tokens."""
    rows, new = (4, 3) if day.tiny else (64, 48)
    generator = np.random.default_rng(0)
    for shape, storage in CELLS[: day.cells]:
        if day.over():
            return day.note("no time for more answers")
        base = base_of(make_model(shape, day.device, day.tiny, day.dtype), shape, storage)
        vocabulary = base.model.config.vocab_size
        prompts = [generator.integers(3, vocabulary, int(generator.integers(20, 200))) for _ in range(rows)]
        bank = bank_of(base)
        slots = [bank.add(LoraConfig(rank=RANK), seed=seed) for seed in range(1 if day.tiny else max(ADAPTERS))]
        answers = Generator(base, bank, GeneratorConfig(max_num_seqs=rows, enable_prefix_caching=False))
        for count in ADAPTERS:
            if day.over():
                break
            taken = {
                name: speed(day, answers, prompts, [slots[i % min(count, len(slots))] for i in range(rows)], new, heat)
                for name, heat in (("greedy", 0.0), ("drawn", 0.7))
            }
            day.add(
                "decoding",
                {"shape": shape, "storage": storage, "adapters": count, "rows": rows, "tokens_per_second": taken},
            )
        del base, bank, answers
        free()
    return None


def speed(
    day: Day, answers: Generator, prompts: list[np.ndarray], slots: list[int], new: int, temperature: float
) -> float:
    """Tokens per second of the second turn; the first warms up."""
    taken = 0.0
    for _ in range(2):
        settings = GenerationConfig(max_new_tokens=new, temperature=temperature)
        generations = [answers.submit(Prompt(prompt, slot), settings) for prompt, slot in zip(prompts, slots)]
        started = clock(day)
        while answers.step():
            pass
        taken = sum(len(each.answer.tokens) for each in generations) / (clock(day) - started)
    return taken


def compiled(day: Day) -> None:
    """Plain beside compiled layers, of a base in 16 and in 4 bits."""
    for storage in ("dense", "nf4"):
        _compiled(day, storage)
        free()


def _compiled(day: Day, storage: str) -> None:
    """One answer at once and many, one adapter and as many as answers."""
    many, new = (3, 3) if day.tiny else (16, 64)
    base = base_of(make_model("0.5B", day.device, day.tiny, day.dtype), "0.5B", storage)
    generator, bank = np.random.default_rng(0), bank_of(base)
    slots = [bank.add(LoraConfig(rank=RANK), seed=seed) for seed in range(many)]
    layers = CompiledDecoding(base, bank, day.note, "eager" if day.tiny else "inductor")
    prompts = [generator.integers(3, base.model.config.vocab_size, 40) for _ in range(many)]
    for rows, adapters in ((1, 1), (many, 1), (many, many)):
        if day.over() or layers.problem is not None:
            break
        taken = {}
        for name in ("plain", "compiled"):
            answers = Generator(base, bank, GeneratorConfig(max_num_seqs=rows, enable_prefix_caching=False))
            answers.compiled = layers if name == "compiled" else None
            own = [slots[index % adapters] for index in range(rows)]
            taken[name] = speed(day, answers, prompts[:rows], own, new, 0.0)
        row = {"storage": storage, "rows": rows, "adapters": adapters, "tokens_per_second": taken}
        day.add("compiled", {**row, "problem": layers.problem})

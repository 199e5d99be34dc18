"""Answering: tokens per second for 1, 16 and 64 adapters in the same steps."""

from __future__ import annotations

import numpy as np

from benchmarks.gpu_day.day import Day
from benchmarks.gpu_day.shapes import bank_of, base_of, make_model
from benchmarks.gpu_day.training import RANK, clock, free
from lowrank.adapters.variants.lora import LoraConfig
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
            taken = {}
            for name, temperature in (("greedy", 0.0), ("drawn", 0.7)):
                settings = GenerationConfig(max_new_tokens=new, temperature=temperature)
                for turn in range(2):  # the first warms up
                    generations = [
                        answers.submit(Prompt(prompt, slots[index % min(count, len(slots))]), settings)
                        for index, prompt in enumerate(prompts)
                    ]
                    started = clock(day)
                    while answers.step():
                        pass
                    if turn:
                        taken[name] = sum(len(each.answer.tokens) for each in generations) / (clock(day) - started)
            day.add(
                "decoding",
                {"shape": shape, "storage": storage, "adapters": count, "rows": rows, "tokens_per_second": taken},
            )
        del base, bank, answers
        free()
    return None

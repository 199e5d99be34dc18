"""Answering: lowrank's continuous batching against transformers' and PEFT's `generate`, in turns.

    python -m benchmarks.decode --rows 16 --adapters 16

Random weights of the shape of Qwen2.5-0.5B (`--layers` for fewer layers), prompts of 20 to 200 tokens, greedy, no stop
token: everybody answers the same number of tokens. Ratios are of processor time on a CPU (wall time on a GPU).

    transformers        the bare model, left-padded batch: what a merged adapter costs
    peft                one LoRA on all linear layers; PEFT's mixed batch where there are more (`adapter_names`)
    lowrank             the same, on the bank
    compiled            the same, through compiled layers (`--contenders lowrank,compiled`)

`--storage nf4` packs the base of `lowrank` and `compiled`. `--uneven` gives every answer another length, from a
quarter of `--new-tokens` up: a padded batch goes on until the longest is done, a place of ours is taken by the next
question. `seconds_after_first_token` is the whole less a run of one token each: on a CPU, torch copies the head's
weight once per row for transformers' first token (a `bmm`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

from benchmarks.gpu_day.shapes import base_of
from benchmarks.machine import describe
from benchmarks.workload import QWEN_05B
from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import LoraConfig as Lora
from lowrank.generate.compiled_decoding import CompiledDecoding
from lowrank.generate.generator import Generator, GeneratorConfig
from lowrank.generate.request import GenerationConfig, Prompt

RANK = 16


def make_model(options: argparse.Namespace) -> Any:
    """The same random model each time."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**{**QWEN_05B, "num_hidden_layers": options.layers})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(options.device).eval().requires_grad_(False)


def with_transformers(options: argparse.Namespace, prompts: list[np.ndarray]) -> Callable[[list[int]], None]:
    """Batches of `rows`, each until its longest answer is done."""
    return _padded(make_model(options), options, prompts, None)


def with_peft(options: argparse.Namespace, prompts: list[np.ndarray]) -> Callable[[list[int]], None]:
    """LoRA in PEFT's way."""
    settings = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(make_model(options), settings, adapter_name="0", autocast_adapter_dtype=False)
    for index in range(1, options.adapters):
        model.add_adapter(str(index), settings)
    model = model.eval().to(torch.bfloat16)
    names = [str(index % options.adapters) for index in range(len(prompts))] if options.adapters > 1 else None
    return _padded(model, options, prompts, names)


def _padded(
    model: Any, options: argparse.Namespace, prompts: list[np.ndarray], names: list[str] | None
) -> Callable[[list[int]], None]:
    def answer(lengths: list[int]) -> None:
        for first in range(0, len(prompts), options.rows):
            members = range(first, min(first + options.rows, len(prompts)))
            longest = max(len(prompts[index]) for index in members)
            token_BL = torch.zeros(len(members), longest, dtype=torch.int64)
            seen_BL = torch.zeros_like(token_BL)
            for row, index in enumerate(members):
                token_BL[row, longest - len(prompts[index]) :] = torch.from_numpy(prompts[index])
                seen_BL[row, longest - len(prompts[index]) :] = 1
            extra = {"adapter_names": [names[index] for index in members]} if names else {}
            model.generate(
                input_ids=token_BL.to(options.device),
                attention_mask=seen_BL.to(options.device),
                max_new_tokens=max(lengths[index] for index in members),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **extra,
            )

    return answer


def with_lowrank(
    options: argparse.Namespace, prompts: list[np.ndarray], *, compile: bool = False
) -> Callable[[list[int]], None]:
    """Adapters on the bank."""
    model = make_model(options)
    base = base_of(model, "random", options.storage)
    bank = Bank(base)
    slots = [bank.add(Lora(rank=RANK, alpha=32), seed=index) for index in range(options.adapters)]

    compiled = CompiledDecoding(base, bank) if compile else None

    def answer(lengths: list[int]) -> None:
        config = GeneratorConfig(
            max_num_seqs=options.rows,
            max_num_batched_tokens=options.step_tokens,
            enable_prefix_caching=False,
        )
        generator = Generator(base, bank, config)
        generator.compiled = compiled
        generations = [
            generator.submit(Prompt(prompt, slots[index % len(slots)]), GenerationConfig(max_new_tokens=lengths[index]))
            for index, prompt in enumerate(prompts)
        ]
        while generator.step():
            pass
        assert [len(each.answer.tokens) for each in generations] == lengths
        assert compiled is None or compiled.problem is None

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16, help="sequences in one batch")
    parser.add_argument("--requests", type=int, help="default: as many as rows")
    parser.add_argument("--adapters", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--step-tokens", type=int, default=512)
    parser.add_argument("--uneven", action="store_true")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--storage", default="dense", help="of lowrank's base: dense, nf4, int8 ...")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contenders", default="transformers,peft,lowrank")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    total = options.requests or options.rows
    prompts = [generator.integers(2, 8000, int(generator.integers(20, 200))) for _ in range(total)]
    shortest = options.new_tokens // 4 if options.uneven else options.new_tokens
    lengths = [int(generator.integers(shortest, options.new_tokens + 1)) for _ in range(total)]
    make = {"transformers": with_transformers, "peft": with_peft, "lowrank": with_lowrank}
    make["compiled"] = partial(with_lowrank, compile=True)
    warnings.filterwarnings("ignore")
    contenders = {name: make[name](options, prompts) for name in options.contenders.split(",")}
    clock = time.process_time if options.device == "cpu" else _gpu_clock
    whole: dict[str, list[float]] = {name: [] for name in contenders}
    after_first: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(options.rounds + 1):
        for name, answer in contenders.items():
            started = clock()
            answer([1] * total)
            first = clock() - started
            started = clock()
            answer(lengths)
            if round_:  # the first warms up
                whole[name].append(clock() - started)
                after_first[name].append(whole[name][-1] - first)
    median = {name: statistics.median(times) for name, times in whole.items()}
    decode = {name: statistics.median(times) for name, times in after_first.items()}
    result = {
        "settings": {**vars(options), "output": None},
        "machine": describe(options.device),
        "answered_tokens": sum(lengths),
        "seconds": whole,
        "seconds_after_first_token": after_first,
        "lowrank_faster_by": {name: value / median["lowrank"] for name, value in median.items()},
        "lowrank_decodes_faster_by": {name: value / decode["lowrank"] for name, value in decode.items()},
    }
    print(json.dumps({key: result[key] for key in result.keys() - {"settings", "machine"}}, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()

"""What it brings that answers to one prompt share its computation: DPO on real pairs, with and without, in turns.

    python -m benchmarks.shared_prompts --data dpo_en_demo.json --data dpo_zh_demo.json
    python -m benchmarks.shared_prompts --data alpaca_en_demo.json --group 8      # answers of a group, as in GRPO

A model of the shape of Qwen2.5-0.5B with random weights and few layers; the same steps both ways, so losses agree to
rounding. Tokens are those of the tokenizer that ships with lowrank.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.machine import describe, load, median_of
from benchmarks.workload import QWEN_05B
from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.data.config import DataConfig
from lowrank.data.prepare import prepare
from lowrank.kernels.glibc_malloc import keep_freed_memory
from lowrank.models.base import Base
from lowrank.models.checkpointing.memory_efficient_modules import use_memory_efficient_modules
from lowrank.models.checks.isolation import choose_layout, shares_prompts
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import choose_dtype, load_tokenizer
from lowrank.objectives.dpo import DPOConfig
from lowrank.objectives.grpo import GRPOConfig
from lowrank.records import Preference, Prompted
from lowrank.segments import Segment, number_the_step
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig


def pairs(data: Path, max_length: int, rows: int) -> list[list[Segment]]:
    """The two answers of each row, with references that are made up."""
    found = _prepared(data, max_length, rows, Preference)
    return [
        [replace(segment, pair=index, reference_L=-segment.weight_L) for segment in sample]
        for index, sample in enumerate(found)
    ]


def groups(data: Path, max_length: int, rows: int, size: int, answer: int) -> list[list[Segment]]:
    """`size` made up answers of `answer` tokens to each prompt, as GRPO draws them."""
    generator, found = np.random.default_rng(0), []
    for (prompted,) in _prepared(data, max_length, rows, Prompted):
        group = []
        for _ in range(size):
            answer_L = generator.integers(300, 4000, answer)
            token_L = np.concatenate([prompted.token_L, answer_L])
            weight_L = np.concatenate([np.zeros(len(prompted)), np.ones(answer)]).astype(np.float32)
            group.append(Segment(token_L, weight_L, signals_L={"advantage": weight_L * generator.normal()}))
        found.append(group)
    return found


def _prepared(data: Path, max_length: int, rows: int, record: type) -> Any:
    source = {"path": str(data), "max_samples": rows}
    settings = DataConfig.model_validate({"train": [source], "max_length": max_length})
    tokenizer = load_tokenizer(ModelConfig(path="lowrank/tiny"))
    return prepare(settings, tokenizer=tokenizer, record=record, seed=0).train.samples


def engine_of(objective: Any, layers: int, micro_batch_tokens: int) -> tuple[Engine, int]:
    """A random base with a LoRA of rank 16 on all of its linear layers."""
    settings = ModelConfig(path="random")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**{**QWEN_05B, "num_hidden_layers": layers})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.to(choose_dtype(settings, torch.device("cpu")))
    use_memory_efficient_modules(model)
    base = Base(model, None, "random")
    choose_layout(base, "auto")
    assert shares_prompts(base)
    bank = Bank(base)
    engine = Engine(base, bank, micro_batch_tokens)
    adapter: Any = LoraConfig(rank=16)
    optimizer: Any = AdamWConfig()
    slot = bank.add(adapter, seed=0)
    engine.add(slot, objective, optimizer, seed=0, neftune_alpha=0.0)
    return engine, slot


def measure(engine: Engine, slot: int, units: list[list[Segment]], per_step: int, rounds: int) -> dict[str, Any]:
    """Medians of the same steps both ways, in turns."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    cpu_seconds: dict[bool, list[float]] = {False: [], True: []}
    losses: dict[bool, list[float]] = {False: [], True: []}
    tokens = dict.fromkeys((False, True), 0)
    steps = [units[first : first + per_step] for first in range(0, len(units) - per_step + 1, per_step)]
    for step in [steps[0], *steps * rounds]:
        work = {slot: number_the_step([segment for unit in step for segment in unit])}
        for shared in (False, True):
            engine.shares_prompts = shared
            tokens[shared] += sum(batch.num_tokens for batch in engine.micro_batches(work))
            started, started_cpu = time.perf_counter(), time.process_time()
            losses[shared].append(engine.forward_backward(work)[slot].loss)
            engine.jobs[slot].optimizer.zero_grad()
            seconds[shared].append(time.perf_counter() - started)
            cpu_seconds[shared].append(time.process_time() - started_cpu)
    apart = max(abs(one - other) for one, other in zip(losses[False], losses[True]))
    cost, cost_cpu = ({way: sum(each[way][1:]) for way in each} for each in (seconds, cpu_seconds))  # 1st: warming up
    step_cpu = [one / other for one, other in zip(cpu_seconds[False][1:], cpu_seconds[True][1:])]
    return {
        "steps": len(seconds[True]) - 1,
        "tokens_whole": tokens[False],
        "tokens_shared": tokens[True],
        "tokens_saved": 1 - tokens[True] / tokens[False],
        "speedup": cost[False] / cost[True],
        "speedup_cpu": cost_cpu[False] / cost_cpu[True],
        "speedup_cpu_median_step": median_of(step_cpu),
        "largest_difference_of_a_loss": apart,
        "load": load(),
    }


def main() -> None:
    """Measure, print, write."""
    options = _options()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    settings = {key: value for key, value in vars(options).items() if key not in ("data", "results")}
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": describe("cpu"),
        "settings": settings,
        "data": {},
    }
    objective = GRPOConfig().build() if options.group else DPOConfig().build()
    engine, slot = engine_of(objective, options.layers, options.micro_batch_tokens)
    for data in options.data:
        rows = options.per_step * options.steps
        if options.group:
            units = groups(data, options.max_length, rows, options.group, options.answer_tokens)
        else:
            units = pairs(data, options.max_length, rows)
        result["data"][data.name] = found = measure(engine, slot, units, options.per_step, options.rounds)
        print(data.name, json.dumps(found, indent=1), flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    stem = f"shared_prompts{'_groups' if options.group else ''}_{result['date'][:10]}"
    (options.results / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True, help="a file of pairs, or of questions")
    parser.add_argument("--group", type=int, default=0, help="answers to each question instead of pairs")
    parser.add_argument("--answer-tokens", type=int, default=128, help="of each answer of a group")
    parser.add_argument("--per-step", type=int, default=2, help="pairs or questions")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()

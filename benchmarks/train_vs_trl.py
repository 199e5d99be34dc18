"""lowrank against TRL + PEFT: tokens per second, memory, and how near the machine's matrix products we come.

    python -m benchmarks.train_vs_trl --data alpaca_en_demo.json

Every contender runs in its own process, in turns, for several rounds; what is compared are medians of steps. See
benchmarks/README.md for what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import workload
from benchmarks.machine import cpu_name, describe, gemm_limit, median_of
from benchmarks.report import table
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import choose_dtype

RANK = 16
LEARNING_RATE = 2e-4
WARMUP_STEPS = 1
"""Steps of each run that are not counted: kernels are compiled, memory is taken for the first time."""

INSTRUCTIONS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
"""What holds a processor down to what others have, for both sides."""

TRL_PACKED = {
    "packing": True,
    "per_device_train_batch_size": 1,
    "gradient_checkpointing": False,
    "bf16": True,
    "model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "sdpa"},
}
"""TRL at its best on this task: nothing recomputed, no padding, the model loaded in the dtype it computes in."""


def contenders(work: workload.Workload, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name to what its process is told. The steps have the same rows wherever two are compared."""
    packed = work.packed(options.tokens)[: options.steps]
    batched = work.batched(options.rows_per_step)[: options.steps]
    ours = {"program": "contender_lowrank", "micro_batch_tokens": 4096}
    trl = {"program": "contender_trl"}
    size = {} if options.rows_per_step == 8 else {"per_device_train_batch_size": options.rows_per_step}
    varlen = options.device == "cuda" and importlib.util.find_spec("flash_attn")
    loaded = {"dtype": options.dtype, "attn_implementation": "flash_attention_2" if varlen else "sdpa"}
    autocast = {"bf16": options.dtype == "bfloat16", "fp16": options.dtype == "float16"}
    trl_packed = {**TRL_PACKED, **autocast, "max_length": options.tokens, "model_init_kwargs": loaded}
    if options.dtype == "float32":  # its default asks for bf16, which a processor without it emulates
        size = {**size, "bf16": False}
    found = {
        "lowrank": {**ours, "steps": packed},
        "trl_packed": {**trl, "steps": packed, "packed": True, "arguments": trl_packed},
        "lowrank_same_rows": {**ours, "steps": batched},
        "trl_default": {**trl, "steps": batched, "packed": False, "arguments": size},
        "lowrank_recomputed": {**ours, "steps": packed, "activation_checkpointing": "full"},
        "lowrank_same_rows_recomputed": {**ours, "steps": batched, "activation_checkpointing": "full"},
        "lowrank_plain_heap": {**ours, "steps": packed, "keep_freed_memory": False},
    }
    if options.dtype == "float32":
        found["lowrank_bf16_storage"] = {**ours, "steps": packed, "storage": "bf16"}
    if options.device == "cuda" and importlib.util.find_spec("unsloth"):
        without = {key: value for key, value in trl_packed.items() if key != "model_init_kwargs"}
        found["unsloth"] = {"program": "contender_unsloth", "steps": packed, "packed": True, "arguments": without}
    return {name: spec for name, spec in found.items() if name in options.contenders}


def run(spec: dict[str, Any], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One contender in a fresh process."""
    common = {"folder": str(folder), "device": options.device, "rank": RANK, "learning_rate": LEARNING_RATE}
    common["dtype"] = options.dtype
    given, result = folder / "spec.json", folder / "result.json"
    given.write_text(json.dumps({**common, **spec}))
    threads = str(options.threads)
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{spec['program']}", str(given), str(result)],
        env={**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{spec['program']} failed:\n{done.stderr[-3000:]}")
    return json.loads(result.read_text())


def check(name: str, steps: list[dict[str, Any]]) -> None:
    """A fast run that learns nothing is no result."""
    for index, step in enumerate(steps):
        if not (math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"]) and step["grad_norm"] > 0):
            raise SystemExit(f"{name}, step {index}: loss {step['loss']}, gradient norm {step['grad_norm']}")
    if len(steps) > 3 and steps[-1]["loss"] >= steps[0]["loss"]:
        raise SystemExit(f"{name}: the loss did not fall, {steps[0]['loss']} to {steps[-1]['loss']}")


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the counted steps of all rounds."""
    counted = [step for one in runs for step in one["steps"][WARMUP_STEPS:]]
    return {
        "tokens_per_second": median_of([step["tokens"] / step["seconds"] for step in counted]),
        "tokens_per_cpu_second": median_of([step["tokens"] / step["cpu_seconds"] for step in counted]),
        "seconds_per_step": [step["seconds"] for step in counted],
        "tokens_per_step": median_of([step["tokens"] for step in counted]),
        "peak_memory_bytes": median_of([one["peak_memory_bytes"] for one in runs]),
        "loss": [step["loss"] for step in runs[0]["steps"]],
        "grad_norm": [step["grad_norm"] for step in runs[0]["steps"]],
        "load": median_of([step["load"] for step in counted]),
        "config": runs[0]["config"],
    }


def limits(work: workload.Workload, options: argparse.Namespace) -> dict[str, Any]:
    """The products' own rate on this machine, now."""
    config = json.loads((work.folder / "model" / "config.json").read_text())
    width, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    narrow = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        (width, width): 2 * layers,
        (narrow, width): 2 * layers,
        (wide, width): 2 * layers,
        (width, wide): layers,
        (config["vocab_size"], width): 1,
    }
    return gemm_limit(shapes, options.tokens, options.device, times=3, dtype=getattr(torch, options.dtype))


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What the issue of this benchmark is, each with its name."""
    made = {}
    pairs = [("lowrank", "trl_packed"), ("lowrank", "trl_default"), ("lowrank_same_rows", "trl_default")]
    pairs += [("lowrank_recomputed", "trl_packed"), ("lowrank_same_rows_recomputed", "trl_default")]
    pairs += [("lowrank", "lowrank_plain_heap"), ("lowrank", "unsloth")]
    pairs += [("lowrank_bf16_storage", "lowrank"), ("lowrank_bf16_storage", "trl_packed")]
    for ours, theirs in pairs:
        if ours in found and theirs in found:
            for key in ("tokens_per_second", "tokens_per_cpu_second", "peak_memory_bytes"):
                made[f"{ours} / {theirs}: {key}"] = found[ours][key] / found[theirs][key]
    return made


def share_of_limit(
    found: dict[str, Any], rates: list[dict[str, Any]], num_parameters: int, work: workload.Workload
) -> dict[str, float]:
    """Our speed over that of the products alone, by the clock and by processor time.

    `of 4N`: 4 FLOP per parameter and token. `of products done`: only learned tokens meet the vocabulary, so the head's
    part counts for them alone.
    """
    config = json.loads((work.folder / "model" / "config.json").read_text())
    head = config["hidden_size"] * config["vocab_size"]
    learned = sum(sum(row.learned) for row in work.rows) / sum(len(row.tokens) for row in work.rows)
    done = num_parameters - head + head * learned
    shares = {}
    for unit in ("second", "cpu_second"):
        per_flop = found[f"tokens_per_{unit}"] / median_of([each[f"flops_per_{unit}"] for each in rates])
        shares[f"of 4N, by {unit}"] = 4 * num_parameters * per_flop
        shares[f"of the products done, by {unit}"] = 4 * done * per_flop
    return shares


def main() -> None:
    """Prepare, run the rounds; the result is written anew after each."""
    options = options_of()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {"num_hidden_layers": options.layers} if options.layers else None
        work = workload.prepare(folder, options.data, 256, shape)
        specs = contenders(work, options)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
        rates = [limits(work, options)]
        for round_number in range(options.rounds):
            for contender, spec in specs.items():
                one = run(spec, folder, options)
                check(contender, one["steps"])
                runs[contender].append(one)
                _print_round(round_number + 1, contender, summarize([one]))
            rates.append(limits(work, options))
            _write(result_of(work, runs, rates, options), options)


def result_of(
    work: workload.Workload,
    runs: dict[str, list[dict[str, Any]]],
    rates: list[dict[str, Any]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What goes into the file."""
    found = {contender: summarize(each) for contender, each in runs.items()}
    num_parameters = workload.count_parameters(json.loads((work.folder / "model/config.json").read_text()))
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": options.device,
        "machine": describe(options.device),
        "workload": {
            "rows": work.source,
            "parameters": num_parameters,
            "rank": RANK,
            "dtype": options.dtype,
            "layers": options.layers,
            "instructions": {name: os.environ[name] for name in INSTRUCTIONS if name in os.environ},
            "tokens_per_step": options.tokens,
            "rows_per_step": options.rows_per_step,
            "steps": options.steps,
            "rounds": len(rates) - 1,
        },
        "contenders": found,
        "ratios": ratios(found),
        "gemm": rates,
    }
    if "lowrank" in found:
        result["share_of_gemm_limit"] = share_of_limit(found["lowrank"], rates, num_parameters, work)
    return result


def _print_round(round_number: int, contender: str, speed: dict[str, Any]) -> None:
    print(
        f"round {round_number} {contender:20s} {speed['tokens_per_second']:8.1f} tokens/s  "
        f"{speed['tokens_per_cpu_second']:8.1f} per CPU second  "
        f"{speed['peak_memory_bytes'] / 1e9:5.2f} GB  load {speed['load']:.1f}",
        flush=True,
    )


def _write(result: dict[str, Any], options: argparse.Namespace) -> None:
    device = result["machine"].get("gpu", cpu_name())
    device = re.sub(r"[^a-z0-9]+", "-", device.lower().replace("(r)", "")).strip("-")
    suffix = f"_{options.threads}-threads" if options.device == "cpu" else ""
    suffix += f"_{options.layers}-layers" if options.layers else ""
    suffix += "_".join(["", options.dtype, *(os.environ[name] for name in INSTRUCTIONS[:1] if name in os.environ)])
    stem = options.results / f"train_vs_trl_{device}{suffix}_{result['date'][:10]}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(result))
    print(f"{stem}.md")


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everyone = ["lowrank", "trl_packed", "lowrank_same_rows", "trl_default", "lowrank_plain_heap"]
    everyone += ["lowrank_recomputed", "lowrank_same_rows_recomputed", "lowrank_bf16_storage", "unsloth"]
    parser.add_argument("--data", type=Path, help="an alpaca json file; without it rows are synthesised")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each contender")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of each run")
    parser.add_argument("--tokens", type=int, default=2048, help="of a packed step")
    parser.add_argument("--rows-per-step", type=int, default=8, help="of an unpacked step; 8 is TRL's default")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to try the script")
    parser.add_argument("--contenders", nargs="+", choices=everyone, default=everyone)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="of both sides; auto: what lowrank takes on this machine",
    )
    options = parser.parse_args(arguments)
    if options.dtype == "auto":
        chosen = choose_dtype(ModelConfig(path=""), torch.device(options.device))
        options.dtype = str(chosen).removeprefix("torch.")
    return options


if __name__ == "__main__":
    main()

"""The memory a plan predicts against the memory a run takes.

    python -m benchmarks.memory_plan --json points.json --out benchmarks/results/memory_plan.md

The whole grid takes about an hour; a second call with the same --json goes on where the first was stopped.

Every point of the grid is a whole run of `lowrank.pipelines.train.train` in a process of its own: random weights of a
real architecture, documents of up to 512 tokens, two optimizer steps. Predicted is what the run said before it loaded
weights, measured is its peak of resident memory (VmHWM). Tokens are those of one job's optimizer step. The processes
are forked from one that has imported the libraries, which saves half of the time; pages they share count for each.

A process of a run holds 700 MB of libraries that no prediction could miss, so the last column is the error in what is
not there yet when the plan is made.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

DOCUMENT = 512
STEPS = 2
KEYS = ("architecture", "storage", "activation_checkpointing", "jobs", "tokens")
"""What a point of the grid is told by."""
_SIZES = {"vocab_size": 16000, "max_position_embeddings": 2048, "tie_word_embeddings": True}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": (
        "Qwen2Config",
        {**_SIZES, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8,
         "num_key_value_heads": 2},
    ),
    "gpt2": ("GPT2Config", {"vocab_size": 16000, "n_positions": 2048, "n_embd": 512, "n_layer": 12, "n_head": 8}),
    "gemma2": (
        "Gemma2Config",
        {**_SIZES, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 128, "sliding_window": 256},
    ),
}  # fmt: skip
"""About 50 million parameters each: grouped-query attention; a fused layout with full heads; soft caps and windows."""


def write_model(architecture: str, folder: Path) -> None:
    """A checkpoint with random weights, and the tokenizer of the base that ships with lowrank."""
    import torch
    import transformers

    from lowrank.models.loading.pretrained import TINY, locate

    name, settings = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(locate(TINY)) / file, folder / file)


def write_data(path: Path) -> None:
    """Rows of a few thousand words, to be split into documents of one length."""
    rng = random.Random(0)
    vocabulary = ["red", "river", "seven", "the", "of", "stone", "letter", "box", "and", "to", "paper", "fish"]
    rows = [{"text": " ".join(rng.choices(vocabulary, k=4000))} for _ in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def run_point(point: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run in a fresh process: its summary's predicted and measured bytes, and what it took."""
    out = folder / "run"
    spec = {
        "model": {
            "path": str(folder / point["architecture"]),
            "dtype": "bfloat16",
            "device": "cpu",
            "storage": point["storage"],
            "activation_checkpointing": point["activation_checkpointing"],
        },
        "data": {
            "train": {"path": str(folder / "rows.jsonl"), "format": "text"},
            "max_length": min(point["tokens"], DOCUMENT),
            "on_too_long": "split",
            "batch_tokens": point["tokens"],
        },
        "objective": "pretrain",
        "max_steps": STEPS,
        "micro_batch_tokens": 4096,
        "save_steps": None,
        "output_dir": str(out),
        "overwrite": True,
        "jobs": [{"name": f"job{index}", "seed": index} for index in range(point["jobs"])],
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    started = time.perf_counter()
    in_a_child(train, folder / "spec.json")
    summary = json.loads((out / "summary.json").read_text())
    return {
        **point,
        "predicted": summary["predicted_peak_memory_bytes"],
        "measured": summary["peak_memory_bytes"],
        "plan": summary["memory_plan"],
        "seconds": time.perf_counter() - started,
    }


def train(spec: Path) -> None:
    """What `lowrank train` does."""
    from lowrank.compat import load_any
    from lowrank.pipelines.train import train as run_train

    settings, _ = load_any(spec, [])
    run_train(settings, reporters=[])


def in_a_child(work: Callable[..., None], *arguments: Any) -> None:
    """Run in a process forked from this one, which has imported the libraries and computed nothing."""
    child = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{work.__name__} of {arguments} ended with {child.exitcode}")


def predict_again(point: dict[str, Any]) -> dict[str, Any]:
    """The same counts of tensors with the planner's constants as they are now."""
    from lowrank.planning.memory import StepBytes
    from lowrank.planning.plan import beside_tensors

    plan, step = point["plan"], StepBytes(**point["plan"]["step"])
    needed = step.total + beside_tensors(plan["resident"], step, plan["forward_passes"])
    return {**point, "predicted": max(needed, plan["loading"])}


def table(points: list[dict[str, Any]]) -> str:
    """Markdown: a row a point, and the errors together."""
    lines = [
        "| architecture | storage | recompute | jobs | tokens of a job | predicted MB | measured MB | error | of new |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    errors = []
    for each in points:
        error = each["predicted"] / each["measured"] - 1.0
        errors.append(abs(error))
        there = each["plan"]["resident"]
        new = (each["predicted"] - there) / (each["measured"] - there) - 1.0
        lines.append(
            f"| {each['architecture']} | {each['storage']} | {each['activation_checkpointing']} | {each['jobs']} | "
            f"{each['tokens']} | "
            f"{each['predicted'] / 1e6:.0f} | {each['measured'] / 1e6:.0f} | {error:+.1%} | {new:+.1%} |"
        )
    within = sum(error <= 0.1 for error in errors)
    mean = sum(errors) / len(errors)
    lines.append(f"\n{within} of {len(errors)} points within 10 %; mean error {mean:.1%}, worst {max(errors):.1%}.")
    return "\n".join(lines)


def main() -> None:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--storages", nargs="+", default=["dense", "nf4", "int8"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 512, 2048])
    parser.add_argument("--jobs", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--activation-checkpointing", nargs="+", default=["none", "full"])
    parser.add_argument("--out", type=Path, help="Also write the table here, as Markdown.")
    parser.add_argument("--json", type=Path, help="Keep every point here, with the parts of its plan; go on from it.")
    parser.add_argument("--again", action="store_true", help="Run nothing: the table of --json by today's constants.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Begin no point after so long.")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch is imported
    grid = itertools.product(
        options.architectures, options.storages, options.activation_checkpointing, options.jobs, options.tokens
    )
    points = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    known = {tuple(point[key] for key in KEYS) for point in points}
    if options.again:
        points, grid = [predict_again(point) for point in points], iter(())
    began = time.perf_counter()
    importlib.import_module("lowrank.pipelines.train")  # with torch and transformers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "rows.jsonl")
        for values in grid:
            if values in known:
                continue
            if time.perf_counter() - began > options.seconds:
                break
            if not (folder / values[0]).exists():
                in_a_child(write_model, values[0], folder / values[0])
            point = run_point(dict(zip(KEYS, values)), folder)
            points.append(point)
            if options.json:
                options.json.write_text(json.dumps(points, indent=1))
            error = point["predicted"] / point["measured"] - 1.0
            print(
                *values,
                f"{point['predicted'] / 1e6:.0f} {point['measured'] / 1e6:.0f} {error:+.1%} {point['seconds']:.0f}s",
                flush=True,
            )
    machine = f"{describe('cpu')['cpu']}, one thread, {datetime.date.today()}"
    text = f"# Predicted and measured peak memory\n\n{machine}\n\n{table(points)}\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()

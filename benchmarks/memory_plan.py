"""The memory a plan predicts against the memory a run takes.

    python -m benchmarks.memory_plan --out benchmarks/results/memory_plan.md

Every point of the grid is a whole run of `lowrank.run.train` in a fresh process: random weights of a real
architecture, documents of up to 512 tokens, two optimiser steps. Predicted is what the run said before it loaded
weights, measured is its peak of resident memory (VmHWM). Tokens are those of one job's optimiser step.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

DOCUMENT = 512
STEPS = 2
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

    from lowrank.models.loading import TINY, locate

    name, settings = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(locate(TINY)) / file, folder / file)


def write_data(path: Path) -> None:
    """Rows of a few thousand words, to be split into documents of one length."""
    rng = random.Random(0)
    words = ["red", "river", "seven", "the", "of", "stone", "letter", "box", "and", "to", "paper", "fish"]
    rows = [{"text": " ".join(rng.choices(words, k=4000))} for _ in range(40)]
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
            "recompute": point["recompute"],
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
    done = subprocess.run(
        [sys.executable, "-m", "lowrank", "train", str(folder / "spec.json"), "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    summary = json.loads((out / "summary.json").read_text())
    return {
        **point,
        "predicted": summary["predicted_peak_memory_bytes"],
        "measured": summary["peak_memory_bytes"],
        "plan": summary["memory_plan"],
        "seconds": time.perf_counter() - started,
    }


def table(points: list[dict[str, Any]]) -> str:
    """Markdown: a row a point, and the errors together."""
    lines = [
        "| architecture | storage | recompute | jobs | tokens of a job | predicted MB | measured MB | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    errors = []
    for each in points:
        error = each["predicted"] / each["measured"] - 1.0
        errors.append(abs(error))
        lines.append(
            f"| {each['architecture']} | {each['storage']} | {each['recompute']} | {each['jobs']} | {each['tokens']} | "
            f"{each['predicted'] / 1e6:.0f} | {each['measured'] / 1e6:.0f} | {error:+.1%} |"
        )
    within = sum(error <= 0.1 for error in errors)
    mean = sum(errors) / len(errors)
    lines.append(f"\n{within} of {len(errors)} points within 10 %; mean error {mean:.1%}, worst {max(errors):.1%}.")
    return "\n".join(lines)


def main() -> None:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--storages", nargs="+", default=["dense"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 512, 2048])
    parser.add_argument("--jobs", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--recompute", nargs="+", default=["none", "full"])
    parser.add_argument("--out", type=Path, help="Also write the table here, as Markdown.")
    parser.add_argument("--json", type=Path, help="Also write every point here, with the parts of its plan.")
    options = parser.parse_args()
    grid = itertools.product(options.architectures, options.storages, options.recompute, options.jobs, options.tokens)
    points = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "rows.jsonl")
        for architecture in options.architectures:
            write_model(architecture, folder / architecture)
        for values in grid:
            keys = ("architecture", "storage", "recompute", "jobs", "tokens")
            point = run_point(dict(zip(keys, values)), folder)
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

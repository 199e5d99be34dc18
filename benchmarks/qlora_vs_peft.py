"""QLoRA: lowrank on an NF4 base against TRL + PEFT + bitsandbytes, with and without evaluations in between.

    python -m benchmarks.qlora_vs_peft --data alpaca_en_demo.json

The same packed steps, in turns, each in its own process. Beside speed and memory it answers whether the gradient is
right: `dequantized` is lowrank on the dense weights that NF4 leaves, and losses are compared with it step by step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import workload
from benchmarks.machine import describe
from benchmarks.train_vs_trl import TRL_PACKED, check, run, summarize

PEFT = {key: value for key, value in TRL_PACKED.items() if key != "model_init_kwargs"}


def contenders(work: workload.Workload, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name to what its process is told; all have the same rows in the same steps."""
    steps = work.packed(options.tokens)[: options.steps]
    ours = {"program": "contender_lowrank", "micro_batch_tokens": 4096, "steps": steps}
    peft = {
        "program": "contender_trl_nf4",
        "steps": steps,
        "packed": True,
        "arguments": {**PEFT, "max_length": options.tokens},
    }
    return {
        "lowrank_nf4": {**ours, "storage": "nf4"},
        "peft_nf4": peft,
        "lowrank_nf4_evaluated": {**ours, "storage": "nf4", "evaluate": True},
        "peft_nf4_evaluated": {**peft, "evaluate": True},
        "lowrank_dequantized": {**ours, "storage": "nf4, dequantized"},
    }


def result_of(
    work: workload.Workload, runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace
) -> dict[str, Any]:
    """What goes into the file."""
    found = {name: summarize(each) for name, each in runs.items() if each}
    ours, theirs = found["lowrank_nf4"], found["peft_nf4"]
    ratios = {
        key: ours[key] / theirs[key] for key in ("tokens_per_second", "tokens_per_cpu_second", "peak_memory_bytes")
    }
    ratios["tokens_per_cpu_second, nf4 / dequantized"] = (
        ours["tokens_per_cpu_second"] / found["lowrank_dequantized"]["tokens_per_cpu_second"]
    )
    right = found["lowrank_dequantized"]["loss"]
    distance = {
        name: max(abs(one - other) / other for one, other in zip(each["loss"], right)) for name, each in found.items()
    }
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": describe(options.device),
        "workload": {"rows": work.source, **{key: getattr(options, key) for key in ("layers", "tokens", "steps")}},
        "rounds": len(runs["lowrank_nf4"]),
        "ratios_lowrank_to_peft": ratios,
        "largest_relative_distance_of_a_loss_from_the_dequantized_run": distance,
        "contenders": found,
    }


def main() -> None:
    """Prepare, run the rounds, write anew after each."""
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = workload.prepare(folder, options.data, 256, {"num_hidden_layers": options.layers})
        runs: dict[str, list[dict[str, Any]]] = {}
        failed: dict[str, str] = {}
        for round_number in range(options.rounds):
            for contender, spec in contenders(work, options).items():
                if round_number and contender not in ("lowrank_nf4", "peft_nf4"):
                    continue  # what only answers whether losses are right is run once
                try:
                    one = run(spec, folder, options)
                except SystemExit as error:
                    if contender != "peft_nf4_evaluated":
                        raise
                    failed[contender] = str(error).strip().splitlines()[-1]  # which is an answer too
                    continue
                if contender != "peft_nf4_evaluated":  # whose gradients are wrong on some processors
                    check(contender, one["steps"])
                runs.setdefault(contender, []).append(one)
                speed = summarize([one])
                print(
                    f"round {round_number + 1} {contender:24s} {speed['tokens_per_cpu_second']:7.1f} tokens per CPU "
                    f"second  {speed['peak_memory_bytes'] / 1e9:5.2f} GB  {speed['loss']}",
                    flush=True,
                )
            result = {**result_of(work, runs, options), "failed": failed}
            stem = options.results / f"qlora_vs_peft_{options.threads}-threads_{result['date'][:10]}"
            stem.parent.mkdir(parents=True, exist_ok=True)
            stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        print(
            json.dumps(
                {key: result[key] for key in result if "ratio" in key or "distance" in key or key == "failed"}, indent=1
            )
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an alpaca json file; without it rows are synthesised")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help="of a packed step")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""What a search costs: 16 candidates with ASHA in one run, against all of them to their end in one run, 16 single runs
of ours, and 16 of TRL's SFTTrainer with PEFT on the same tokenized rows. `python -m benchmarks.sweep [RESULT.json]`.

Each way is measured in a process of its own, by wall and processor time from its first import to its last result. Read
ratios of processor time: other work may run beside.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, peak_memory

RANKS, RATES = (4, 8, 16, 32), (1e-3, 3e-3, 1e-2, 3e-2)
WAYS = ("asha", "asha_25", "full", "single", "trl")
"""asha: the sweep's own rungs. asha_25: with `first_rung: 0.25`, where a high learning rate no longer looks best."""


def settings(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """The run of one seed, without its candidates."""
    return {
        "model": {"path": spec["path"], "dtype": "float32", "device": "cpu"},
        "data": {
            "train": [{"path": "lowrank/demo", "max_samples": spec["rows"]}],
            "eval": [{"path": "lowrank/demo-heldout", "max_samples": spec["held_out"]}],
            "batch_size": spec["batch_size"],
        },
        "schedule": {"type": "cosine", "warmup_ratio": spec["warmup_ratio"]},
        "max_steps": spec["steps"],
        "eval_steps": None,
        "save_steps": None,
        "seed": spec["seed"],
        "output_dir": str(out),
    }


def ours(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """asha, asha_25 and full: one run; single: sixteen."""
    from lowrank.config import validate_settings
    from lowrank.pipelines.train import train

    grid = {"adapter.rank": list(RANKS), "optimizer.learning_rate": list(RATES)}
    if spec["way"] != "single":
        sweep: dict[str, Any] = {"grid": grid, "search": "none" if spec["way"] == "full" else "asha"}
        if spec["way"] == "asha_25":
            sweep["first_rung"] = 0.25
        summary = train(validate_settings({**settings(spec, folder / "run"), "sweep": sweep}))
        table = json.loads((folder / "run" / "sweep.json").read_text(encoding="utf-8"))
        losses = {row["name"]: row["loss"] for row in table["candidates"] if row["state"] == "done"}
        return {"losses": losses, "best": table["best"], "steps": table["steps"], "tokens": summary["train_tokens"]}
    losses, tokens = {}, 0
    for rank in RANKS:
        for rate in RATES:
            given = settings(spec, folder / f"{rank}-{rate}")
            job = {"adapter": {"rank": rank}, "optimizer": {"learning_rate": rate}}
            summary = train(validate_settings({**given, **job}))
            tokens += summary["train_tokens"]
            losses[f"{rank}-{rate}"] = summary["jobs"]["default"]["last_eval"]["loss"]
    return {"losses": losses, "best": min(losses, key=losses.__getitem__), "tokens": tokens}


def trl(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Sixteen SFTTrainers, each on the model as it loads it, with the same rows in the same steps."""
    import datasets
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from lowrank.config import validate_settings
    from lowrank.models.loading.pretrained import load_tokenizer, locate
    from lowrank.pipelines.job_data import prepare_all

    config = validate_settings(settings(spec, folder / "unused"))
    tokenizer = load_tokenizer(config.model)
    (data,) = prepare_all(config.jobs, config.model, tokenizer, lambda event: None, strict=False)
    learned = [segment for _ in range(spec["steps"]) for segment in data.train.next_step()]
    losses = {}
    for rank in RANKS:
        for rate in RATES:
            arguments = SFTConfig(
                output_dir=str(folder / "trl"), use_cpu=True, max_steps=spec["steps"], learning_rate=rate,
                per_device_train_batch_size=spec["batch_size"], lr_scheduler_type="cosine",
                warmup_steps=math.ceil(spec["warmup_ratio"] * spec["steps"]),
                train_sampling_strategy="sequential", save_strategy="no", report_to=[], disable_tqdm=True,
                logging_steps=1000, bf16=False, gradient_checkpointing=False, max_grad_norm=1.0, weight_decay=0.0,
                per_device_eval_batch_size=spec["batch_size"], loss_type="nll",
            )  # fmt: skip
            adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
            trainer = SFTTrainer(
                model=str(locate(spec["path"])), args=arguments, peft_config=adapter, processing_class=tokenizer,
                train_dataset=datasets.Dataset.from_list([_row(each) for each in learned]),
                eval_dataset=datasets.Dataset.from_list([_row(each) for each in data.eval]),
            )  # fmt: skip
            trainer.train()
            losses[f"{rank}-{rate}"] = trainer.evaluate()["eval_loss"]
    return {"losses": losses, "best": min(losses, key=losses.__getitem__), "tokens": 16 * sum(map(len, learned))}


def _row(segment: Any) -> dict[str, list[int]]:
    tokens = segment.token_L.tolist()
    return {
        "input_ids": tokens,
        "labels": [token if weight else -100 for token, weight in zip(tokens, segment.weight_L)],
    }


def of_widths(folder: Path, layers: int) -> str:
    """A base of Qwen2.5-0.5B's widths with random weights, the tokenizer of lowrank/tiny, and so many layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.workload import QWEN_05B
    from lowrank.models.packaged import locate

    shutil.copytree(locate("lowrank/tiny"), folder, ignore=shutil.ignore_patterns("*.safetensors", "*.py", "__*"))
    config = AutoConfig.from_pretrained(folder)
    kept = {name: value for name, value in QWEN_05B.items() if not name.endswith("_token_id") and name != "vocab_size"}
    wide = type(config)(**{**config.to_dict(), **kept, "num_hidden_layers": layers, "head_dim": 64})
    AutoModelForCausalLM.from_config(wide).save_pretrained(folder)
    return str(folder)


def child(spec: dict[str, Any]) -> None:
    """One way, measured."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = trl(spec, Path(folder)) if spec["way"] == "trl" else ours(spec, Path(folder))
    found |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time()}
    print("RESULT " + json.dumps(found | {"peak_memory_bytes": peak_memory()}))


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, "-m", "benchmarks.sweep", "--child", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stdout + done.stderr)
    found = json.loads(lines[-1].removeprefix("RESULT "))
    cost = f"{found['cpu_seconds']:.1f} s of processor time, {found['seconds']:.1f} s"
    print(f"{spec['way']}, seed {spec['seed']}: {cost}, best {found['losses'][found['best']]:.4f} ({found['best']})")
    return found


def main() -> None:
    """All ways, interleaved: every seed of the searches, the first of the others. What RESULT.json has is not measured
    again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("result", nargs="?", type=Path)
    parser.add_argument("--child")
    parser.add_argument("--model", default="lowrank/tiny")
    parser.add_argument("--widths", type=int, metavar="LAYERS", help="instead: Qwen2.5-0.5B's widths, random weights")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--warmup-ratio", type=float, default=0.03)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--single-seeds", type=int, default=1, help="seeds for which all are trained one after another")
    given = parser.parse_args()
    if given.child:
        child(json.loads(given.child))
        return
    with tempfile.TemporaryDirectory() as folder:
        label, path = given.model, given.model
        if given.widths:
            label = f"Qwen2.5-0.5B's widths, {given.widths} layers, random weights"
            path = of_widths(Path(folder, "model"), given.widths)
        found = measure_all(given, {"model": label}, path)
    print(json.dumps(compared(found), indent=1))


def measure_all(given: argparse.Namespace, label: dict[str, str], path: str) -> dict[str, list[dict[str, Any]]]:
    """The runs of every way, written as they come."""
    spec = label | {name: getattr(given, name) for name in ("steps", "batch_size", "rows", "held_out", "warmup_ratio")}
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    if given.result and given.result.is_file():
        before = json.loads(given.result.read_text(encoding="utf-8"))
        assert before["spec"] == spec, f"{given.result} was measured with {before['spec']}"
        found |= before["runs"]
    for seed in range(given.seeds):
        for way in given.ways:
            once = way in ("single", "trl") and seed >= given.single_seeds
            if once or any(run["seed"] == seed for run in found[way]):
                continue
            found[way].append({"seed": seed, **measure({**spec, "path": path, "way": way, "seed": seed})})
            result = {"machine": describe("cpu"), "spec": spec, **compared(found), "runs": found}
            if given.result:  # after each: a machine that others use too may not last
                given.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return found


def compared(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Processor seconds, and ratios over the seeds that two ways have in common."""
    cpu = {way: {run["seed"]: run["cpu_seconds"] for run in runs} for way, runs in found.items() if runs}
    ratios = {}
    for way in WAYS[1:]:
        both = [seed for seed in cpu.get(way, ()) if seed in cpu.get("asha", ())]
        if both:
            ratios[way] = sum(cpu[way][seed] for seed in both) / sum(cpu["asha"][seed] for seed in both)
    best = {way: {run["seed"]: run["losses"][run["best"]] for run in runs} for way, runs in found.items()}
    peaks = {way: max(run["peak_memory_bytes"] for run in runs) for way, runs in found.items() if runs}
    return {
        "cpu_seconds": {way: statistics.mean(own.values()) for way, own in cpu.items()},
        "asha_is_so_many_times_cheaper_than": ratios,
        "winner_minus_best_of_full": {
            way: [own[seed] - best["full"][seed] for seed in own if seed in best["full"]] for way, own in best.items()
        },
        "peak_memory_bytes": peaks,
        "memory_of_sixteen_processes_over_asha": 16 * peaks["single"] / peaks["asha"] if "single" in peaks else None,
    }


if __name__ == "__main__":
    main()

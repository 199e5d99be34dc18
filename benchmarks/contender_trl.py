"""One run of TRL's SFTTrainer with PEFT, in a process of its own: `python -m benchmarks.contender_trl SPEC RESULT`.

The rows come tokenized, with labels, exactly as lowrank gets them, in the same steps.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from benchmarks import workload
from benchmarks.machine import load, peak_memory, wait

IGNORED = -100
SHOWN = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "packing",
    "packing_strategy",
    "padding_free",
    "bf16",
    "gradient_checkpointing",
    "loss_type",
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "max_grad_norm",
    "weight_decay",
    "max_length",
    "model_init_kwargs",
)


class Clock(transformers.TrainerCallback):
    """Time, loss and gradient norm of each optimizer step."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[tuple[float, float]] = []
        self.loads: list[float] = []
        self.logged: list[dict[str, float]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        seconds, cpu_seconds = self._now()
        self.seconds.append((seconds - self._started[0], cpu_seconds - self._started[1]))
        self.loads.append(load())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "grad_norm" in logs:
            self.logged.append(logs)

    def _now(self) -> tuple[float, float]:
        wait(self.device)
        return time.perf_counter(), time.process_time()


def rows_of(work: workload.Workload, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The dataset: one row per sample, or (packed) one per step with its documents' lengths, as TRL's packing makes."""
    made = []
    for numbers in spec["steps"]:
        rows = [work.rows[number] for number in numbers]
        samples = [
            {
                "input_ids": row.tokens,
                "labels": [token if learned else IGNORED for token, learned in zip(row.tokens, row.learned)],
            }
            for row in rows
        ]
        if spec["packed"]:
            joined = {key: [token for sample in samples for token in sample[key]] for key in ("input_ids", "labels")}
            made.append({**joined, "seq_lengths": [len(row.tokens) for row in rows]})
        else:
            made += samples
    return made


def with_peft(path: str, spec: dict[str, Any]) -> dict[str, Any]:
    """What SFTTrainer is told about the model: load it yourself, and add a PEFT adapter."""
    config = LoraConfig(r=spec["rank"], lora_alpha=2 * spec["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    return {"model": path, "peft_config": config}


def main(spec: dict[str, Any], model: Callable[[str, dict[str, Any]], dict[str, Any]] = with_peft) -> dict[str, Any]:
    """Train the steps of `spec`; what was measured."""
    work = workload.read(Path(spec["folder"]))
    arguments = SFTConfig(
        output_dir=str(Path(spec["folder"]) / "trl"),
        use_cpu=spec["device"] == "cpu",
        max_steps=len(spec["steps"]),
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True} if spec["packed"] else None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=spec["device"] == "cuda",
        **spec["arguments"],
    )
    clock = Clock(spec["device"])
    trainer = SFTTrainer(
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows_of(work, spec)),
        processing_class=transformers.AutoTokenizer.from_pretrained(work.model),
        callbacks=[clock],
        **model(work.model, spec),
    )
    trainer.train()
    tokens = [sum(len(work.rows[number].tokens) for number in numbers) for numbers in spec["steps"]]
    steps = [
        {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "tokens": count,
            "loss": float(logs["loss"]),
            "grad_norm": float(logs["grad_norm"]),
            "load": busy,
        }
        for (seconds, cpu_seconds), count, logs, busy in zip(clock.seconds, tokens, clock.logged, clock.loads)
    ]
    assert len(steps) == len(spec["steps"]), "a step was not logged"
    peak = torch.cuda.max_memory_allocated() if spec["device"] == "cuda" else peak_memory()
    config = {key: value for key in SHOWN if (value := getattr(arguments, key)) is not None}
    config["dtype"] = str(next(p.dtype for p in trainer.model.parameters() if not p.requires_grad))
    config["attn_implementation"] = trainer.model.config._attn_implementation
    return {"steps": steps, "peak_memory_bytes": peak, "config": config}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text())), default=str))

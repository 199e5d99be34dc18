"""Settings as a LLaMA-Factory file: what has a key there, and in comments what has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank.board import form
from lowrank.board.runs import flattened_through_lists

_KEYS = {
    "model.path": "model_name_or_path",
    "model.revision": "model_revision",
    "adapter.rank": "lora_rank",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "data.max_length": "cutoff_len",
    "data.max_samples": "max_samples",
    "data.validation_split": "val_size",
    "data.batch_size": "gradient_accumulation_steps",
    "optimizer.learning_rate": "learning_rate",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.max_grad_norm": "max_grad_norm",
    "schedule.type": "lr_scheduler_type",
    "schedule.warmup_ratio": "warmup_ratio",
    "schedule.warmup_steps": "warmup_steps",
    "num_train_epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "save_steps": "save_steps",
    "logging_steps": "logging_steps",
    "eval_steps": "eval_steps",
    "output_dir": "output_dir",
    "seed": "seed",
    "neftune_noise_alpha": "neftune_noise_alpha",
    "data.train_on_prompt": "train_on_prompt",
    "data.mask_history": "mask_history",
    "adapter.loraplus_lr_ratio": "loraplus_lr_ratio",
}
"""Settings that mean the same there. Their batch is rows per device times steps of accumulation: here one row each."""
_OURS = {
    "adapter.rank": 16, "adapter.alpha": 32, "data.max_length": 2048, "data.batch_size": 16,
    "optimizer.learning_rate": 2e-4, "schedule.type": "cosine", "num_train_epochs": 3.0, "save_steps": 500,
    "logging_steps": 10, "optimizer.weight_decay": 0.0, "seed": 42,
}  # fmt: skip
"""Our defaults where theirs may differ: always written."""
_STAGES = {"sft": "sft", "pretrain": "pt", "dpo": "dpo", "kto": "kto", "reward": "rm", "ppo": "ppo"}
_VARIANTS = {
    "dora": ("use_dora",),
    "rsdora": ("use_dora", "use_rslora"),
    "rslora": ("use_rslora",),
    "pissa": ("pissa_init",),
}


def as_llamafactory(settings: Mapping[str, Any]) -> str:
    """A YAML file for `llamafactory-cli train`, which lowrank reads too. What cannot be said there is in comments."""
    given = {
        **_OURS,
        **flattened_through_lists({key: value for key, value in settings.items() if key not in ("jobs", "data")}),
    }
    data = settings.get("data") or {}
    given |= {f"data.{key}": value for key, value in data.items() if key not in ("train", "eval")}
    adapter, objective = str(given.pop("adapter.type", "lora")), str(given.pop("objective.type", "sft"))
    if "adapter.alpha" not in flattened_through_lists(dict(settings)):
        given["adapter.alpha"] = 2 * int(given["adapter.rank"]) if isinstance(given["adapter.rank"], int) else 32
    lines: dict[str, Any] = {
        "stage": _STAGES.get(objective, "sft"),
        "do_train": True,
        "finetuning_type": {"full": "full", "freeze": "freeze"}.get(str(given.pop("tuning", "")), "lora"),
        "lora_target": "all",
        "dataset": ", ".join(_stem(path) for path in data.get("train") or ()),
        "dataset_dir": "data",
        "per_device_train_batch_size": 1,
    }
    comments = []
    if adapter in _VARIANTS:
        lines |= dict.fromkeys(_VARIANTS[adapter], True)
    elif adapter != "lora":
        comments.append(f"adapter.type: {adapter}")
    if objective not in _STAGES:
        comments.append(f"objective.type: {objective}")
    if str(given.pop("model.storage.type", "dense")) == "nf4":
        lines |= {"quantization_bit": 4, "quantization_method": "bnb"}
    for path, value in given.items():
        if path in _KEYS:
            lines[_KEYS[path]] = value
        else:
            comments.append(f"{path}: {value}")
    if settings.get("jobs"):
        comments.append(f"jobs: {[job.get('name') for job in settings['jobs']]}")
    text = form.as_yaml(lines)
    if comments:
        text += "# LLaMA-Factory has no key for these:\n" + "".join(f"#   {' '.join(c.split())}\n" for c in comments)
    return text


def _stem(source: Any) -> str:
    path = str(source.get("path", "")) if isinstance(source, Mapping) else str(source)
    return path.rpartition("/")[2].partition(".")[0]

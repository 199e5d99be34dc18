"""Which settings a newcomer sees, and starting points in plain words. All others are behind the search field."""

from __future__ import annotations

from typing import Any

GROUPS: dict[str, tuple[str, ...]] = {
    "method": ("model.storage.type", "adapter.type", "adapter.rank", "adapter.alpha", "objective.type"),
    "learning": ("num_train_epochs", "optimizer.learning_rate", "data.batch_size", "schedule.type", "adapter.dropout"),
    "checking": (
        "data.validation_split", "data.max_length", "eval_steps", "early_stopping_patience", "save_steps", "seed",
    ),
}  # fmt: skip
"""Groups of the page, each with its settings. Their names stand in the texts as `field.<setting>`."""

SEARCH = ("sweep.search", "sweep.max_trials", "sweep.sampler")
"""Settings that stand below the rows of a search."""

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"max_steps": 60, "adapter.rank": 8, "data.validation_split": 0.05, "logging_steps": 1, "eval_steps": 20},
    "good": {"num_train_epochs": 3, "adapter.rank": 16, "data.validation_split": 0.05},
    "best": {
        "num_train_epochs": 5, "adapter.type": "dora", "adapter.rank": 64, "optimizer.learning_rate": 0.0001,
        "data.validation_split": 0.05, "schedule.warmup_ratio": 0.03, "early_stopping_patience": 3,
    },
    "small": {
        "model.storage.type": "nf4", "adapter.rank": 8, "data.batch_size": 8, "data.max_length": 1024,
        "micro_batch_tokens": 1024, "model.activation_checkpointing": "full", "data.validation_split": 0.05,
    },
}  # fmt: skip
"""What each starting point changes. Everything it does not name goes back to the default."""

EXPORTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gguf", ("q8_0", "q4_k_m", "f16")),
    ("ollama", ("q8_0", "q4_k_m")),
    ("merged", ()),
    ("peft", ()),
    ("gptq", ()),
    ("awq", ()),
    ("compressed_tensors", ()),
    ("merged_4bit", ()),
    ("lora_gguf", ()),
)
"""Targets of `lowrank export` with a card, and for GGUF the types offered first."""

"""Settings of runs on conversations about pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def settings(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(world / "model"), "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(world / "mllm.json")], "eval": [str(world / "mllm.json")], "batch_size": 2},
        "output_dir": str(out),
        "micro_batch_tokens": 400,
        "optimizer": {"learning_rate": 1e-2},
        "eval_steps": 4,
        "num_train_epochs": 3,
        "jobs": [
            {"name": "a", "adapter": {"rank": 4, "dropout": 0.1}},
            {"name": "b", "adapter": {"rank": 8}, "neftune_noise_alpha": 5.0},
        ],
        **changes,
    }

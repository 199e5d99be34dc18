"""The settings of a run of a few seconds, from rows in memory."""

from __future__ import annotations

from typing import Any

ROWS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(24)
]


QUICK: dict[str, Any] = {
    "model": {"path": "lowrank/tiny", "dtype": "float32"},
    "adapter": {"target_modules": ["q_proj"]},
    "max_steps": 3,
    "logging_steps": 1,
    "seed": 7,
}


def settings(**own: Any) -> dict[str, Any]:
    return {**QUICK, "data": {"train": ROWS, "batch_size": 4}, **own}

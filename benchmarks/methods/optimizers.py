"""The table of optimizers: the twenty steps of tests/train/test_optimizer_peers.py, and what an update costs."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks.methods.costs import base_of_the_tables, link, summary_of
from lowrank.train.optimizers import bytes_of_state
from tests.train.test_optimizer_peers import OPTIMIZERS, build, fresh, take_steps, theirs

HEAD = """
## Optimizers

`optimizer: {{type: ...}}`, of any job; those for *full* only with `tuning: full` or `freeze`. *State*: bytes for each
parameter of the model of the first table, trained whole ({size:.1f} M parameters; GaLore and APOLLO at rank 16, BAdam
one of its two layers). *Time*: of the update alone, CPU time against `adamw`'s. *Difference*: the largest from its peer
after twenty steps of random gradients, relative to the distance moved.

| type | in a word | when | paper | for | state | time | peer | difference |
|---|---|---|---|---|---|---|---|---|
"""
_PEERS = {
    "adafactor": "transformers",
    "adam_mini": "adam-mini",
    "adamw": "torch",
    "apollo": "apollo-torch",
    "badam": "torch, block by block",
    "galore": "galore-torch",
    "galore_8bit": "galore-torch",
    "muon": "torch",
    "schedule_free": "schedulefree",
    "sgd": "torch",
}


_BY_THE_TESTS = {"badam": "1e-06", "muon": "1e-06", "apollo": "< 1e-04"}
"""What the tests allow. apollo-torch is not free software, so it is no dependency; the test ran with it in 2026-11."""
_LOW_RANK = ("galore", "galore_8bit", "apollo")


def page() -> str:
    """The section, in Markdown."""
    found, size = _costs()
    lines = []
    for name, config in OPTIMIZERS.items():
        settings: Any = config
        state, seconds = found[name]
        peer = _PEERS.get(name, "bitsandbytes")
        lines.append(
            f"| `{name}` | {summary_of(config)} | {settings.when} | {link(settings.paper)} | "
            f"{'full' if settings.not_for_adapters else 'any'} | {state / size:.2f} | "
            f"{seconds / found['adamw'][1]:.2f} | {peer} | {_difference(name)} |"
        )
    return HEAD.format(size=size / 1e6) + "\n".join(lines) + "\n"


def _costs() -> tuple[dict[str, tuple[int, float]], int]:
    """({optimizer: (bytes of its state, CPU seconds of an update)}, parameters)."""
    shapes = {name: value.shape for name, value in base_of_the_tables().model.named_parameters()}
    found: dict[str, tuple[int, float]] = {}
    for name, config in OPTIMIZERS.items():
        settings: Any = config
        parameters = {key: torch.nn.Parameter(0.02 * torch.randn(shape)) for key, shape in shapes.items()}
        optimizer = settings(**({"rank": 16} if name in _LOW_RANK else {})).build(parameters, head_dim=64)
        seconds = []
        for _ in range(4):
            for value in parameters.values():
                value.grad = 0.01 * torch.randn_like(value)
            start = time.process_time()
            optimizer.step()
            seconds.append(time.process_time() - start)
        found[name] = (bytes_of_state(optimizer), min(seconds[1:]))
    return found, sum(shape.numel() for shape in shapes.values())


def _difference(name: str) -> str:
    if name in _BY_THE_TESTS:
        return _BY_THE_TESTS[name]
    ours, others, start = fresh(), fresh(), fresh()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda: None)  # galore-torch waits for a GPU, there or not
        take_steps(theirs(name, others), others, 0, 20)
    take_steps(build(name, ours), ours, 0, 20)
    apart = [(ours[key] - others[key]).abs().max() / (others[key] - start[key]).abs().max() for key in ours]
    return f"{max(float(each) for each in apart):.0e}"

"""What a step costs: CPU time, and bytes kept for the backward pass, of the same work for all methods."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lowrank.segments import Segment
from lowrank.train.engine import Engine
from tests.tiny_models import make_base

SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 4}
Work = Sequence[Segment]


def base_of_the_tables() -> Any:
    """A random Llama of width 512 with 2 layers, float32."""
    return make_base("llama", torch.float32, **SHAPE, head_dim=64, max_position_embeddings=1024)


def costs(methods: Mapping[str, tuple[Engine, int, Work]]) -> dict[str, tuple[float, int]]:
    """(CPU seconds of an optimizer step, the least of 6 in turns; bytes kept for its backward pass) of each."""
    best: dict[str, float] = {}
    for _ in range(6):
        for name, method in methods.items():
            best[name] = min(best.get(name, math.inf), _step(*method))
    return {name: (best[name], _kept(*method)) for name, method in methods.items()}


def _step(engine: Engine, slot: int, work: Work) -> float:
    start = time.process_time()
    engine.forward_backward({slot: work}, {slot: 1e-4})
    engine.optim_step(slot, 1e-4)
    return time.process_time() - start


def _kept(engine: Engine, slot: int, work: Work) -> int:
    seen: dict[int, int] = {}
    mine = {parameter.untyped_storage().data_ptr() for parameter in engine.base.model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        engine.forward_backward({slot: work}, {slot: 1e-4})
    engine.optim_step(slot, 1e-4)
    return sum(seen.values())


def against(found: Mapping[str, tuple[float, int]], name: str, plain: str) -> str:
    """Two cells of a table: time and bytes, as multiples of `plain`'s."""
    return " | ".join(f"{mine / other:.2f}" for mine, other in zip(found[name], found[plain]))


def link(paper: str) -> str:
    """For a table."""
    if paper.startswith("arXiv:"):
        return f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
    return f"<{paper}>" if paper else ""


def summary_of(config: Any) -> str:
    """The summary of a settings class."""
    text = " ".join((config.__doc__ or "").split())
    return text.split(". ")[0].split(";")[0].rstrip(".")

"""BAdam: AdamW of one block of layers at a time, which is all that gradients, moments and masters are kept for."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch

from lowrank.errors import ConfigError
from lowrank.settings import Positive
from lowrank.train.optimizers import Groups
from lowrank.train.optimizers.adamw import AdamSettings

_LAYER = re.compile(r"^(?:.*?\.)?\d+(?=\.)")
"""`model.layers.3` of `model.layers.3.mlp.up_proj.weight`."""


class BAdamConfig(AdamSettings):
    """AdamW of one decoder layer at a time, the others frozen meanwhile; moments start anew with each layer. Keeps
    gradients, moments and float32 masters of one layer."""

    paper = "arXiv:2404.02827"
    when = "full tuning in little more memory than the 16-bit weights"
    not_for_adapters = "the matrices of an adapter are small already"
    is_blockwise = True
    type: Literal["badam"] = "badam"
    switch_interval: Positive = 50
    """Steps on one block."""
    switch_mode: Literal["descending", "ascending", "random", "fixed"] = "descending"
    """The order of blocks: from the last layer down, from the first up, another order in each round; `fixed` stays."""
    start_block: int | None = None
    """Where it begins, counted from 0; left out: the last layer, or the first if ascending."""
    include_embedding: bool = False
    """The embedding is a block too, before the first layer."""
    include_lm_head: bool = False
    """The head and the final norm are a block too, after the last layer."""

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        return BAdam(groups, self)


class BAdam(torch.optim.Optimizer):
    """torch's AdamW over the active block, which is determined by the number of steps taken."""

    def __init__(self, groups: Groups, settings: BAdamConfig) -> None:
        self.settings = settings
        names = [name for group in groups for name in group["names"]]
        self.blocks = blocks_of(names, settings.include_embedding, settings.include_lm_head)
        start = settings.start_block
        if not self.blocks or (start is not None and not 0 <= start < len(self.blocks)):
            raise ConfigError(
                f"optimizer.start_block: {start}, and there are {len(self.blocks)} blocks"
                if self.blocks
                else "optimizer.type: badam finds no layers by number in this model's parameters; use galore"
            )
        defaults = {"lr": settings.learning_rate, "weight_decay": 0.0, "taken": 0}
        super().__init__(groups, defaults)
        self._train: Callable[[Collection[str]], None] = lambda names: None
        self._turn()

    def set_block_callback(self, train: Callable[[Collection[str]], None]) -> None:
        """See BlockwiseOptimizer."""
        self._train = train
        train(self.active)

    @property
    def active(self) -> frozenset[str]:
        """The names of the parameters of the active block."""
        return frozenset(self.blocks[self._place(self.param_groups[0]["taken"] // self.settings.switch_interval)])

    def _place(self, turn: int) -> int:
        number, mode = len(self.blocks), self.settings.switch_mode
        start = self.settings.start_block
        if mode == "random":
            drawn = torch.randperm(number, generator=torch.Generator().manual_seed(turn // number)).tolist()
            return start if turn == 0 and start is not None else drawn[turn % number]
        if start is None:
            start = 0 if mode == "ascending" else number - 1
        return (start + {"ascending": turn, "descending": -turn, "fixed": 0}[mode]) % number

    def _turn(self) -> None:
        """Return an optimizer of the active block, which shares this one's state."""
        active, groups = self.active, []
        for group in self.param_groups:
            params = [each for name, each in zip(group["names"], group["params"]) if name in active]
            groups.append({"params": params, "weight_decay": group["weight_decay"], "of": group})
        self._inner = self.settings.fused_adamw([group for group in groups if group["params"]])
        self._inner.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure, no loss
        del closure
        for group in self._inner.param_groups:
            group["lr"] = group["of"]["lr"]
        self._inner.step()
        for group in self.param_groups:
            group["taken"] += 1
        if self.param_groups[0]["taken"] % self.settings.switch_interval == 0:
            self.state.clear()
            self._train(self.active)
            self._turn()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._train(self.active)  # `taken` is there already; the block's masters must be wide before moments are put on
        super().load_state_dict(state_dict)
        self._turn()


def blocks_of(names: Sequence[str], include_embedding: bool, include_lm_head: bool) -> list[list[str]]:
    """Return the names of the parameters of each block, in the order of the layers."""
    layers: dict[str, list[str]] = {}
    embedding: list[str] = []
    rest: list[str] = []
    for name in names:
        found = _LAYER.match(name)
        if found:
            layers.setdefault(found[0], []).append(name)
        else:
            (embedding if re.search(r"embed|\bw[tp]e\b", name) else rest).append(name)
    ordered = sorted(layers, key=lambda layer: [int(part) for part in re.findall(r"\d+", layer)])
    first, last = [embedding] if include_embedding else [], [rest] if include_lm_head else []
    return [block for block in [*first, *(layers[layer] for layer in ordered), *last] if block]

"""EVA: LoRA that starts from the directions its own data takes (arXiv:2410.07170).

Before training, some of the job's own steps go through the bare base, and the principal components of each layer's
inputs are found as they pass. A starts as the first of them, B as zero, so the function is the base's. Ranks go where
they explain most: the components of all layers compete for the sum of the ranks, and a layer may get up to `rho` times
its own, or none, and then has no adapter. alpha follows the rank, so the scale stays. What is saved is a plain LoRA.

Without data (a memory plan, a layer whose weight the model takes apart and that is never called) it starts as LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import ClassVar, Literal

import torch
from pydantic import Field

from lowrank.adapters.calibration import CalibrationSteps, InputRecorder
from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.variants.base import AdapterSite, SiteSetup, Tensors
from lowrank.adapters.variants.lora import Lora, LoraConfig
from lowrank.adapters.variants.pissa import largest_singular
from lowrank.kernels.accelerators import widest
from lowrank.models.storages import BaseLinear
from lowrank.settings import Positive

_NITER = 4


class EvaConfig(AdapterSettings):
    """Explained variance adaptation: starts from the job's own data, and gives ranks to the layers that use them. Saved
    as plain LoRA."""

    paper: ClassVar[str] = "arXiv:2410.07170"
    when: ClassVar[str] = "ranks of 16 and less, where they have to go to the right layers"
    needs_calibration: ClassVar[bool] = True
    type: Literal["eva"] = "eva"
    rho: float = Field(default=2.0, ge=1.0)
    """A layer gets at most this many times its rank; 1: no rank moves."""
    tau: float = Field(default=0.99, ge=0.0, le=1.0)
    """It has seen enough once every direction is this close (cosine) to where it was a step before."""
    use_label_mask: bool = True
    """Look only at tokens that are learned."""
    most_steps: Positive = 32
    """Optimizer steps of the job's own data that it looks at, if they do not settle before."""

    def build(self) -> Eva:
        """An `Eva` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return Eva(self)

    def as_saved(self) -> AdapterSettings:
        """Plain LoRA."""
        return LoraConfig(**self.shared())


class Eva(Lora, SiteSetup):
    """LoRA but for its start and its ranks."""

    def __init__(self, settings: EvaConfig) -> None:
        self.settings = settings
        self._rows: dict[int, torch.Tensor] = {}
        """A (R, D) by the layer's id."""
        self._ranks: dict[str, int] = {}

    def setup(self, site: AdapterSite, rank: int) -> None:
        """Look at the data."""
        del rank
        if site.calibration is None:
            return
        leaders, found = self._find_components(site, site.calibration)
        self._ranks = share_out(site.ranks, self.settings.rho, leaders, found)
        for name, leader in leaders.items():
            self._rows[id(site.layers[name])] = found[leader].direction_CD[: self._ranks[name]]

    def layer_rank(self, name: str, rank: int, alpha: float) -> tuple[int, float]:
        """What the layer was given, and alpha with it."""
        own = self._ranks.get(name, rank)
        return own, alpha * own / rank

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """A: directions of the data."""
        tensors = super().init(base, rank, scale, generator)
        rows = self._rows.get(id(base))
        return tensors if rows is None else {**tensors, "lora_A": rows.contiguous()}

    def _find_components(
        self, site: AdapterSite, calibration: CalibrationSteps
    ) -> tuple[dict[str, str], dict[str, Components]]:
        """(layer -> the first one with the same input, what was found for those)."""
        found: dict[str, Components] = {}
        waiting: dict[str, list[torch.Tensor]] = {}
        watch = InputRecorder(site.layers, lambda name, x_ND: waiting.setdefault(name, []).append(x_ND[chosen_N]))
        most = max(round(rank * self.settings.rho) for rank in site.ranks.values())
        for step in islice(calibration(), self.settings.most_steps):
            for calibration_pass in step:
                learned = self.settings.use_label_mask and bool(calibration_pass.learned_N.any())
                chosen_N = calibration_pass.learned_N if learned else torch.ones_like(calibration_pass.learned_N)
                watch.record(calibration_pass.run)
            for name, parts in waiting.items():
                x_ND = torch.cat(parts).float()
                found.setdefault(name, Components(most)).add(x_ND)
            waiting.clear()
            ranks = share_out(site.ranks, self.settings.rho, watch.leaders, found)
            needed = {leader: max(ranks[n] for n, own in watch.leaders.items() if own == leader) for leader in found}
            if all(components.steadiness(needed[name]) >= self.settings.tau for name, components in found.items()):
                break
        return watch.leaders, found


class Components:
    """Principal components of rows that come in batches: incremental PCA (Ross et al., IJCV 77, 2008), as PEFT's.

    Each batch is put beside the components so far, weighted by their singular values, and a row for the move of the
    mean; the singular vectors of that are the new ones.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.direction_CD = torch.empty(0, 0)
        """Orthonormal, the strongest first; at most `count`."""
        self.explained_C = torch.empty(0)
        """Share of the variance of all rows."""
        self._cosine_C = torch.zeros(0)
        self._strength_C = torch.empty(0)
        self._mean_D = torch.empty(0)
        self._seen = 0
        self._spread = 0.0
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x_ND: torch.Tensor) -> None:
        """Take (N, D) float32 into account."""
        num, before = len(x_ND), self.direction_CD
        mean_D = x_ND.mean(0, dtype=widest(x_ND.device))
        centered_ND = x_ND - mean_D.float()
        self._spread += float(centered_ND.square().sum(dtype=widest(x_ND.device)))
        rows = [centered_ND]
        if self._seen:
            apart_D = (self._mean_D - mean_D) * math.sqrt(self._seen * num / (self._seen + num))
            self._spread += float(apart_D.square().sum())
            rows = [self._strength_C[:, None] * before, centered_ND, apart_D.float()[None]]
            mean_D = (self._mean_D * self._seen + mean_D * num) / (self._seen + num)
        self._mean_D, self._seen = mean_D, self._seen + num
        stacked = torch.cat(rows)
        count = min(self.count, *stacked.shape)
        _, self._strength_C, right_DC = largest_singular(stacked, count, _NITER, self._generator)
        self.direction_CD = right_DC.t().contiguous()
        self.explained_C = self._strength_C.square() / max(self._spread, 1e-30)
        shared = min(len(before), count)
        self._cosine_C = torch.zeros(count)
        if shared:
            self._cosine_C[:shared] = (before[:shared] * self.direction_CD[:shared]).sum(1).abs().cpu()

    def steadiness(self, needed: int) -> float:
        """The least cosine between one of the first `needed` directions and what it was a batch before."""
        return float(self._cosine_C[:needed].min()) if needed else 1.0


def share_out(
    ranks: Mapping[str, int], rho: float, leaders: Mapping[str, str], found: Mapping[str, Components]
) -> dict[str, int]:
    """The layers' ranks, given anew to those whose components explain most. Layers with one input may get up to `rho`
    times the largest of their ranks, as in PEFT."""
    most = {leader: max(round(ranks[n] * rho) for n, own in leaders.items() if own == leader) for leader in found}
    offers = [
        (-float(share), place, name)
        for name, leader in leaders.items()
        for place, share in enumerate(found[leader].explained_C[: most[leader]].tolist())
    ]
    given = dict.fromkeys(leaders, 0)
    for _, _, name in sorted(offers, key=lambda offer: offer[0])[: sum(ranks[name] for name in leaders)]:
        given[name] += 1
    return given

"""AdaLoRA: LoRA as P diag(E) Q, whose ranks wander to the layers that need them (arXiv:2303.10512).

Every layer begins with rank `rank`. From step `tinit` on, the triplets (a row of A, its number in E, a column of B) of
all layers are ranked by their importance, smoothed sensitivity times its uncertainty, and the least important numbers
are set to 0, more of them by a cubic schedule, until `target_r` per layer are left; the last `tfinal` steps change
ranks no more. A penalty keeps A and B orthonormal. What is saved is plain LoRA with a rank for each layer, which
computes the same, and which more programs read than PEFT's AdaLoRA files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Union

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.peft_kind import LORA, PeftKind
from lowrank.adapters.variants.base import FileForm, Tensors, TrainingHooks, Variant
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.errors import ModelError
from lowrank.models.storages import BaseLinear
from lowrank.settings import Fraction, NonNegative, Positive

_RANK_EPSILON = 1e-5
"""PEFT divides by the rank plus this."""
_OF_TRAINING = (
    "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
)  # fmt: skip
_PREFIX = "base_model.model."
_PARTS = ("lora_A", "lora_E", "lora_B")
Steps = Union[NonNegative, Annotated[float, Field(gt=0, lt=1)]]  # noqa: UP007 (read at run time on Python 3.10)


class AdaLoraConfig(AdapterSettings):
    """Adaptive LoRA: ranks move to the layers that need them while it trains; saved as LoRA."""

    paper: ClassVar[str] = "arXiv:2303.10512"
    when: ClassVar[str] = "a small rank on average, and no idea which layers need it"
    refused: ClassVar[Mapping[str, str]] = {
        "rank_pattern": "AdaLoRA finds the ranks itself; use target_r",
        "target_parameters": "AdaLoRA does not reach fused experts; use lora",
    }
    peft: ClassVar[PeftKind] = replace(LORA, type="ADALORA")
    type: Literal["adalora"] = "adalora"
    rank: Positive = 12
    """Rank of every layer at the start, PEFT's `init_r`."""
    target_r: Positive | None = None
    """Rank that is left, on the average of all layers; left out: two thirds of `rank`."""
    tinit: Steps = 0.1
    """Steps before ranks begin to fall, or a share of the job."""
    tfinal: Steps = 0.3
    """Steps at the end in which ranks stay, or a share of the job."""
    deltaT: Positive = 10
    """Steps between two allocations."""
    beta1: Fraction = 0.85
    """Smoothing of sensitivities."""
    beta2: Fraction = 0.85
    """Smoothing of their uncertainty."""
    orth_reg_weight: float = Field(default=0.5, ge=0)
    """Weight of the penalty on A and B that are not orthonormal."""

    @model_validator(mode="after")
    def _ranks_fall(self) -> Self:
        if self.target_r is not None and self.target_r > self.rank:
            raise ValueError(f"target_r: {self.target_r} is more than the rank of {self.rank} that layers begin with")
        return self

    def build(self) -> Variant:
        """An `AdaLora` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return AdaLora(self)

    def as_saved(self) -> AdapterSettings:
        """LoRA."""
        return LoraConfig(**self.shared())

    @classmethod
    def read_as_saved(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
        """PEFT's AdaLoRA files as LoRA: E multiplied into A, a rank for each layer, alphas that keep the scale."""
        return _as_lora(fields, tensors)

    def schedule_problem(self, num_steps: int) -> str | None:
        """The schedule leaves no step in which ranks fall."""
        first, last = _steps(self.tinit, num_steps), num_steps - _steps(self.tfinal, num_steps)
        if first < last:
            return None
        return (
            f"adapter.tinit and tfinal: the job has {num_steps} steps, of which {first} before and {num_steps - last} "
            "after leave none in which ranks fall; make them smaller, or train longer"
        )


class AdaLora(Variant, TrainingHooks, FileForm):
    """`lora_A` (R, D) and `lora_B` (O, R) start normal with deviation 0.02, `lora_E` (R, 1) at zero, as in PEFT."""

    files_hold_all = False

    def __init__(self, config: AdaLoraConfig) -> None:
        self.config = config
        self._average: dict[str, torch.Tensor] = {}
        """Smoothed sensitivities and uncertainties, `<layer> <tensor> ipt` and `... unc`."""
        self._kept: dict[str, torch.Tensor] = {}
        """Once the ranks stay: which triplets of each layer are left, (R) bool."""

    def scale(self, rank: int, alpha: float) -> float:
        """alpha / rank."""
        return alpha / (rank + _RANK_EPSILON)

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """Identity at the start, since E is zero."""
        del scale
        return {
            "lora_A": 0.02 * torch.randn(rank, base.in_features, generator=generator),
            "lora_E": torch.zeros(rank, 1),
            "lora_B": 0.02 * torch.randn(base.out_features, rank, generator=generator),
        }

    def as_low_rank(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """(diag(E) A, B)."""
        return tensors["lora_A"] * tensors["lora_E"], tensors["lora_B"]

    def saved(self, tensors: Tensors) -> Tensors:
        """LoRA's A and B without the triplets that are 0, but for one."""
        kept_R = tensors["lora_E"][:, 0] != 0
        if not kept_R.any():
            kept_R[0] = True
        A_RD, B_OR = self.as_low_rank(tensors)
        return {"lora_A": A_RD[kept_R], "lora_B": B_OR[:, kept_R]}

    def target_in_files(self, scale: float, saved: Tensors) -> tuple[int, float]:
        """Ranks are what is left; alphas make the scale what it was."""
        rank = len(saved["lora_A"])
        return rank, scale * rank

    def penalty(self, layers: Mapping[str, Tensors]) -> torch.Tensor | None:
        """orth_reg_weight times the mean of || A A^T - 1 || and || B^T B - 1 || over all layers."""
        if not self.config.orth_reg_weight:
            return None
        distances = []
        for tensors in layers.values():
            for rows_RX in (tensors["lora_A"], tensors["lora_B"].t()):
                one_RR = torch.eye(len(rows_RX), dtype=rows_RX.dtype, device=rows_RX.device)
                distances.append(torch.linalg.norm(rows_RX @ rows_RX.t() - one_RR))
        return self.config.orth_reg_weight * torch.stack(distances).mean()

    @torch.no_grad()
    def after_update(self, layers: Mapping[str, Tensors], step: int, num_steps: int) -> None:
        """Take note of how important each number was, and set the least important ones to 0."""
        first, last = _steps(self.config.tinit, num_steps), num_steps - _steps(self.config.tfinal, num_steps)
        if step < last:
            self._kept = {}
            self._observe(layers)
            if step > first and step % self.config.deltaT == 0:
                self._allocate(layers, self._budget(layers, (step - first) / (last - first)))
        elif not self._kept:
            self._kept = self._allocate(layers, self._budget(layers, 1.0))
            self._average = {}
        else:
            for name, kept_R in self._kept.items():
                layers[name]["lora_E"].masked_fill_(~kept_R[:, None], 0.0)

    def state(self) -> Tensors:
        """Averages, and what is kept."""
        return {**self._average, **{f"{name} kept": kept_R for name, kept_R in self._kept.items()}}

    def load_state(self, tensors: Tensors) -> None:
        """What `state` gave."""
        kept = {key: tensor for key, tensor in tensors.items() if key.endswith(" kept")}
        self._kept = {key.removesuffix(" kept"): tensor.bool() for key, tensor in kept.items()}
        self._average = {key: tensor.clone() for key, tensor in tensors.items() if key not in kept}

    def _observe(self, layers: Mapping[str, Tensors]) -> None:
        """Smooth |p dL/dp| and how far it is from its average."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        for name, tensors in layers.items():
            for part in _PARTS:
                value = tensors[part]
                now = torch.zeros_like(value) if value.grad is None else (value * value.grad).abs()
                before = self._average.get(f"{name} {part} ipt", torch.zeros_like(now))
                unsure = self._average.get(f"{name} {part} unc", torch.zeros_like(now))
                self._average[f"{name} {part} ipt"] = average = beta1 * before + (1 - beta1) * now
                self._average[f"{name} {part} unc"] = beta2 * unsure + (1 - beta2) * (now - average).abs()

    def _budget(self, layers: Mapping[str, Tensors], share: float) -> int:
        """Triplets that are left after this share of the steps in which ranks fall."""
        begin = sum(len(tensors["lora_E"]) for tensors in layers.values())
        target = (self.config.target_r or max(1, self.config.rank * 2 // 3)) * len(layers)
        return int((begin - target) * (1 - share) ** 3 + target)

    def _allocate(self, layers: Mapping[str, Tensors], budget: int) -> dict[str, torch.Tensor]:
        """Set all but the `budget` most important triplets to 0; which are left, (R) bool by layer."""
        scores = {name: self._importance(name) for name in layers}
        all_N = torch.cat(list(scores.values()))
        if budget >= len(all_N):
            return {name: torch.ones_like(score_R, dtype=torch.bool) for name, score_R in scores.items()}
        threshold = torch.kthvalue(all_N, len(all_N) - budget)[0]
        kept = {name: score_R > threshold for name, score_R in scores.items()}
        for name, kept_R in kept.items():
            layers[name]["lora_E"].masked_fill_(~kept_R[:, None], 0.0)
        return kept

    def _importance(self, layer: str) -> torch.Tensor:
        """Of each triplet, (R): of its number in E, and the mean over its row of A and its column of B."""
        A_RD, E_R1, B_OR = (
            self._average[f"{layer} {part} ipt"] * self._average[f"{layer} {part} unc"] for part in _PARTS
        )
        return E_R1[:, 0] + (A_RD.mean(1) + B_OR.mean(0))


def _steps(value: float, num_steps: int) -> int:
    """A number of steps, or a share of them."""
    return int(value) if value >= 1 or value == 0 else math.ceil(value * num_steps - 1e-9)


def _as_lora(fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(adapter_config.json, tensors) of the LoRA that computes the same. ModelError if a layer lacks a part."""
    start, alpha = fields.get("init_r") or 12, fields.get("lora_alpha") or 8
    scale = (alpha if alpha > 0 else start) / (start + 1e-5)
    modules = [name.removesuffix(".lora_E") for name in tensors if name.endswith(".lora_E")]
    parts = {f"{module}.{part}" for module in modules for part in ("lora_A", "lora_E", "lora_B")}
    missing = sorted(parts - tensors.keys())
    if missing:
        raise ModelError(f"an AdaLoRA adapter without {', '.join(missing[:3])}")
    found = {name: tensor for name, tensor in tensors.items() if name not in parts}
    ranks: dict[str, int] = {}
    for module in modules:
        A_RD = tensors[f"{module}.lora_A"] * tensors[f"{module}.lora_E"]
        if len(A_RD):  # a layer may have lost all of its ranks
            found |= {f"{module}.lora_A.weight": A_RD, f"{module}.lora_B.weight": tensors[f"{module}.lora_B"]}
            ranks[f"^{re.escape(module.removeprefix(_PREFIX))}"] = len(A_RD)
    kept = {name: value for name, value in fields.items() if name not in _OF_TRAINING}
    patterns = {"rank_pattern": ranks, "alpha_pattern": {name: scale * rank for name, rank in ranks.items()}}
    return {**kept, **patterns, "peft_type": "LORA", "r": start, "lora_alpha": alpha}, found

"""Bottleneck adapters: a small network behind the attention or the MLP of every layer (arXiv:1902.00751).

    h_TD -- W_down --> non-linearity -- W_up --> * scaling --> + h_TD

PEFT has no such adapters. Names, meanings and files are those of AdapterHub's library `adapters` (`BnConfig`), whose
decoder models are the oracle (tests/adapters/bottleneck). What an adapter there calls the residual is the stream that
goes around the block. Letters: T rows, D hidden size, M bottleneck (D // reduction_factor).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import nn
from torch.nn import functional as F
from typing_extensions import Self

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.peft_kind import PeftKind

Activation = Callable[[torch.Tensor], torch.Tensor]
LEAKY = "leakyrelu"
"""AdapterHub's one name that transformers does not have."""
OF_NO_LAYER = "a bottleneck adapter is all there is in its files; train copies with a lora job"


class BottleneckSettings(AdapterSettings):
    """Settings of all bottleneck adapters, by AdapterHub's names; the variants differ in their defaults."""

    peft: ClassVar[PeftKind] = PeftKind("BOTTLENECK")
    refused: ClassVar[Mapping[str, str]] = {
        "modules_to_save": OF_NO_LAYER,
        "target_parameters": "a bottleneck adapter reaches no weights",
        "trainable_token_indices": OF_NO_LAYER,
    }
    unused: ClassVar[tuple[str, ...]] = (
        "rank", "alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "loraplus_lr_ratio",
        "loraplus_lr_embedding",
        "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model",
    )  # fmt: skip
    mh_adapter: bool = True
    """An adapter behind each layer's attention."""
    output_adapter: bool = True
    """An adapter behind each layer's MLP."""
    reduction_factor: float | dict[str, float] = 16.0
    """The hidden size over the width of the bottleneck; or for single layers, by number: `{"1": 8, "default": 16}`."""
    non_linearity: str = "swish"
    """The activation in the bottleneck, by transformers' names: relu, swish, gelu, tanh ... or leakyrelu."""
    is_parallel: bool = False
    """The adapter reads the stream that goes around the block, not the block's output."""
    scaling: float | Literal["learned", "channel"] = 1.0
    """What the adapter's output is multiplied by: a number, or one (`learned`) or D (`channel`) that are trained."""
    original_ln_before: bool = False
    """The stream is added to what the adapter reads."""
    original_ln_after: bool = True
    """The stream is added to what comes out, as the model does. False: only where the adapter has added it already
    (`original_ln_before: true` and `residual_before_ln: false`)."""
    residual_before_ln: bool = True
    """What goes around the bottleneck is the block's output as it came; False: as the adapter reads it."""
    adapter_residual_before_ln: bool = False
    """With `ln_after`: what goes around the bottleneck is added before that norm."""
    ln_before: bool = False
    """A trained layer norm before the bottleneck."""
    ln_after: bool = False
    """A trained layer norm behind the bottleneck."""
    init_weights: Literal["bert", "mam_adapter", "houlsby"] = "bert"
    """How it begins: `bert` (normal, 0.02) and `houlsby` (truncated, 0.01) near the base; `mam_adapter` at it."""
    leave_out: tuple[int, ...] = ()
    """Layers, from 0, without an adapter."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        problems = []
        if not (self.mh_adapter or self.output_adapter):
            problems.append("mh_adapter and output_adapter are both false, so there is nothing to train")
        factors = self.reduction_factor if isinstance(self.reduction_factor, dict) else {"all": self.reduction_factor}
        problems += [
            f"reduction_factor: {value!r} of layer {key}; a number above 0, please"
            for key, value in factors.items()
            if not (math.isfinite(value) and value > 0)
        ]
        if not isinstance(self.scaling, str) and not math.isfinite(self.scaling):
            problems.append(f"scaling: {self.scaling!r} is no finite number")
        if self.non_linearity.lower() != LEAKY and self.non_linearity.lower() not in _activations():
            known = ", ".join(sorted(_activations()))
            problems.append(f"non_linearity: {self.non_linearity!r} is not among {known}, {LEAKY}")
        kept = self.original_ln_before and not self.residual_before_ln and not self.is_parallel
        if not self.original_ln_after and not kept:
            problems.append(
                "original_ln_after: false would leave out the stream around the block; it needs original_ln_before: "
                "true and residual_before_ln: false"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def unsaveable(self) -> str | None:
        """Never: AdapterHub's layout, not PEFT's, is theirs."""
        return None

    @property
    def reads_stream(self) -> bool:
        """Whether it needs the stream around the block."""
        return self.is_parallel or self.original_ln_before

    @property
    def unmergeable(self) -> str | None:
        """Always: why no export can merge it, as the end of a sentence, and what to do instead."""
        return (
            "it is a network of its own between the layers, with a non-linearity in it, so no weights of the model can "
            "take it in: serve it as it is (lowrank serve), or take it to AdapterHub's library (--to peft writes "
            "its files)"
        )

    @property
    def title(self) -> str:
        """In a few words: `houlsby /16`."""
        factor = self.reduction_factor
        described = "" if isinstance(factor, dict) else f" /{factor:g}"
        return f"{getattr(self, 'type', 'bottleneck')}{described}"

    def width(self, layer: int, hidden_size: int) -> int:
        """M of a layer, as AdapterHub rounds it. ValueError where the settings do not say it."""
        factor = self.reduction_factor
        if isinstance(factor, dict):
            if str(layer) not in factor and "default" not in factor:
                raise ValueError(f"reduction_factor names neither layer {layer} nor a default")
            factor = factor.get(str(layer), factor.get("default", 1.0))
        return max(1, int(hidden_size // factor))

    def learning_rate_factor(self, name: str, parameter: torch.Tensor, learning_rate: float) -> float:
        """1: LoRA+ is about matrices of LoRA."""
        del name, parameter, learning_rate
        return 1.0


def _activations() -> Mapping[str, Activation]:
    """By their names. The import takes seconds, for which settings without a bottleneck need not wait."""
    from transformers.activations import ACT2FN

    return ACT2FN


def activation(name: str) -> Activation:
    """The function of a `non_linearity`."""
    return F.leaky_relu if name.lower() == LEAKY else _activations()[name.lower()]


def fresh(
    config: BottleneckSettings, layer: int, hidden_size: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The tensors of one adapter in float32, by AdapterHub's names."""
    bottleneck = config.width(layer, hidden_size)
    down_MD, up_DM = torch.empty(bottleneck, hidden_size), torch.zeros(hidden_size, bottleneck)
    if config.init_weights == "bert":
        down_MD.normal_(0.0, 0.02, generator=generator)
        up_DM.normal_(0.0, 0.02, generator=generator)
    elif config.init_weights == "houlsby":
        for matrix in (down_MD, up_DM):
            nn.init.trunc_normal_(matrix, 0.0, 1e-2, -2e-2, 2e-2, generator=generator)
    else:  # kaiming uniform with a = sqrt(5)
        bound = hidden_size**-0.5
        down_MD.uniform_(-bound, bound, generator=generator)
    found = {
        down_name(config, "weight"): down_MD,
        down_name(config, "bias"): torch.zeros(bottleneck),
        "adapter_up.weight": up_DM,
        "adapter_up.bias": torch.zeros(hidden_size),
    }
    for norm, there in (("adapter_norm_before", config.ln_before), ("adapter_norm_after", config.ln_after)):
        if there:
            found |= {f"{norm}.weight": torch.ones(hidden_size), f"{norm}.bias": torch.zeros(hidden_size)}
    if isinstance(config.scaling, str):
        found["scaling"] = torch.ones(hidden_size if config.scaling == "channel" else 1)
    return found


def down_name(config: BottleneckSettings, part: str) -> str:
    """The projection down stands behind the norm in AdapterHub's sequence."""
    return f"adapter_down.{int(config.ln_before)}.{part}"


@dataclass(frozen=True)
class Bottleneck:
    """One slot's adapter at one place. `tensors` are float32 masters, cast in every pass."""

    config: BottleneckSettings
    tensors: Mapping[str, torch.Tensor]

    def __call__(self, h_TD: torch.Tensor, stream_TD: torch.Tensor | None, drop: Activation | None) -> torch.Tensor:
        """The block's output with the adapter behind it, the stream around the block left out, which the model adds."""
        config = self.config
        own = {name: tensor.to(h_TD.dtype) for name, tensor in self.tensors.items()}
        read_TD = h_TD
        if config.reads_stream:
            assert stream_TD is not None
            read_TD = stream_TD if config.is_parallel else h_TD + stream_TD
        # x - stream = h: where the model's own addition stands for the adapter's, h goes around
        around_h = config.is_parallel or config.residual_before_ln or not config.original_ln_after
        around_TD = h_TD if around_h else read_TD
        inner_TD = self._normed(read_TD, own, "adapter_norm_before")
        down_TM = F.linear(inner_TD, own[down_name(config, "weight")], own[down_name(config, "bias")])
        up_TD = F.linear(activation(config.non_linearity)(down_TM), own["adapter_up.weight"], own["adapter_up.bias"])
        up_TD = up_TD * (own["scaling"] if isinstance(config.scaling, str) else config.scaling)
        if drop is not None:
            up_TD = drop(up_TD)
        if config.adapter_residual_before_ln and not config.is_parallel:
            return self._normed(up_TD + around_TD, own, "adapter_norm_after")
        return self._normed(up_TD, own, "adapter_norm_after") + around_TD

    def _normed(self, x_TD: torch.Tensor, own: Mapping[str, torch.Tensor], norm: str) -> torch.Tensor:
        if f"{norm}.weight" not in own:
            return x_TD
        return F.layer_norm(x_TD, x_TD.shape[-1:], own[f"{norm}.weight"], own[f"{norm}.bias"])

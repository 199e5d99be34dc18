"""AWQ's scales: folded without changing what is computed, whatever the family, and for the better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank.export.merge.merged import Merged
from lowrank.export.merge.tensor_names import Names
from lowrank.export.quantize.activation_aware import Scaled
from lowrank.export.quantize.calibration import quantize_in_order
from lowrank.export.quantize.folding import find_folds
from lowrank.export.source import Source
from lowrank.quantization.activation_aware import channel_scales
from lowrank.quantization.linear import asymmetric
from lowrank.segments import unweighted
from tests.export.sources import make_source

DOCUMENTS = [unweighted(np.random.default_rng(seed).integers(3, 90, 40)) for seed in range(4)]

FOLDED = {
    "llama": 7, "qwen2": 7, "gemma2": 7, "gemma3": 7, "olmo2": 2, "phi3": 2, "cohere2": 7, "stablelm": 7, "opt": 6,
    "glm4": 5,
}  # fmt: skip
"""Linears of a layer whose inputs can have scales. OLMo 2 has no norm before attention and MLP; Phi-3's and GLM-4's
fused projections cannot be scaled in part."""


def to_nearest(weight_OD: torch.Tensor, moment_DD: torch.Tensor) -> torch.Tensor:
    """4 bits, groups of 32 where that divides."""
    del moment_DD
    return asymmetric(weight_OD, 4, 32 if weight_OD.shape[1] % 32 == 0 else None).weight()


def in_layers(source: Source, prepare: Callable[..., None], quantize: Callable[..., Any] | None = None) -> None:
    merged = Merged(source)
    names = Names(source.base, merged.checkpoint)
    linears = [name for name, each in names.model.named_modules() if isinstance(each, nn.Linear) and "layers." in name]
    keep = lambda name, weight_OD, moment_DD: weight_OD  # noqa: E731
    quantize_in_order(source, merged, linears, DOCUMENTS, quantize or keep, lambda done, of: None, prepare)


@pytest.mark.parametrize("family", FOLDED)
def test_every_family_finds_its_own(family: str, tmp_path: Path) -> None:
    """In float64, so that what the layer computes may not change at all."""
    source = _source(tmp_path, family, torch.float64)
    merged = Merged(source)
    names = Names(source.base, merged.checkpoint)
    scaled = Scaled(merged, names.file_name, to_nearest)
    folded: list[int] = []

    def prepare(
        parts: Mapping[str, nn.Module], linears: Mapping[str, nn.Module], moments: Any, run: Callable[[], torch.Tensor]
    ) -> None:
        before, done = run(), scaled.folded
        scaled.prepare(parts, linears, moments, run)
        torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-5)
        folded.append(scaled.folded - done)

    in_layers(source, prepare)
    assert folded == [FOLDED[family]] * len(folded)
    assert any(not torch.allclose(scale, torch.ones_like(scale)) for scale in scaled.columns.values())


def test_heads_that_share_values_are_told_apart(tmp_path: Path) -> None:
    """4 heads of 8 over 2 of keys and values: outputs 0-7 and 8-15 are the first, 16-23 and 24-31 the second."""
    source = _source(tmp_path, "llama", torch.float32)
    found = []
    in_layers(source, lambda parts, linears, moments, run: found.extend(find_folds(parts, linears, run)))
    (fold,) = [each for each in found if each.producer == "model.layers.0.self_attn.v_proj"]
    assert fold.consumers == ("model.layers.0.self_attn.o_proj",)
    assert fold.row_D.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]
    (norm,) = [each for each in found if each.producer == "model.layers.0.input_layernorm"]
    assert [name.rpartition(".")[2] for name in norm.consumers] == ["q_proj", "k_proj", "v_proj"]


def test_what_others_need_is_left_alone() -> None:
    """A norm whose output also leaves the layer: folding would change that, and is taken back."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up = nn.RMSNorm(16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) + self.up(self.norm(x))

    torch.manual_seed(0)
    layer, x_TD = Layer().requires_grad_(False), torch.randn(12, 16) * torch.logspace(0, 2, 16)
    parts: dict[str, nn.Module] = {"norm": layer.norm, "up": layer.up}
    linears = {"up": layer.up}
    run = lambda: layer(x_TD)  # noqa: E731
    assert [fold.producer for fold in find_folds(parts, linears, run)] == ["norm"]

    class Dense(dict[str, torch.Tensor]):
        def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
            return self[name].to(dtype)

    merged: Any = Dense(layer.state_dict())
    scaled = Scaled(merged, str, to_nearest)
    before = run()
    normed = layer.norm(x_TD)
    scaled.prepare(parts, linears, {"up": normed.t() @ normed}, run)
    assert (scaled.folded, scaled.changed, scaled.columns) == (0, {}, {})
    assert torch.equal(run(), before)


def test_scales_spend_the_levels_where_inputs_are_large() -> None:
    torch.manual_seed(0)
    weight_OD, x_TD = torch.randn(64, 128), torch.randn(400, 128)
    x_TD[:, 7] *= 30
    moment_DD = x_TD.t() @ x_TD / len(x_TD)
    scale_D = channel_scales(weight_OD, moment_DD, torch.arange(128), 128, to_nearest)
    assert scale_D.argmax() == 7

    def error(value_OD: torch.Tensor) -> float:
        return float((x_TD @ (value_OD - weight_OD).t()).square().mean())

    plain = error(asymmetric(weight_OD, 4, 32).weight())
    assert error(asymmetric(weight_OD * scale_D, 4, 32).weight() / scale_D) < 0.3 * plain
    shared_R = channel_scales(weight_OD, moment_DD, torch.arange(128) // 2, 64, to_nearest)
    assert shared_R.argmax() == 3


def _source(folder: Path, family: str, dtype: torch.dtype) -> Source:
    found = make_source(folder, None, family, dtype)
    model = found.model.model_copy(update={"dtype": "float32"})
    return Source(**{**vars(found), "model": model, "tokenizer": _Tokens()})


class _Tokens:
    """Nothing is tokenized here."""

    eos_token_id = bos_token_id = pad_token_id = None

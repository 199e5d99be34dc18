"""Several adapters as one, against PEFT's `add_weighted_adapter`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lowrank.adapters.variants import lora, rslora
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import AdapterOnDisk, save_adapter
from lowrank.errors import ModelError
from lowrank.export.merge.combine import CombineConfig, combine
from tests.checkpoints.test_peft_layout import random_adapter
from tests.tiny_models import make_model

IN_PEFT = {
    "add": "cat", "linear": "linear", "ties": "ties", "dare": "dare_linear", "dare_ties": "dare_ties",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _peft_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        yield


def pair(first: Any, second: Any) -> tuple[Any, list[tuple[str, AdapterOnDisk]]]:
    model = make_model("llama")
    one, other = random_adapter(model, first), random_adapter(model, second)
    generator = torch.Generator().manual_seed(9)
    changed = {name: torch.randn(value.shape, generator=generator).double() for name, value in other.tensors.items()}
    return model, [("a", one), ("b", replace(other, tensors=changed))]


def update(adapter: AdapterOnDisk, module: str) -> torch.Tensor:
    scale = adapter.config.build().scale(*adapter.targets[module])
    return scale * adapter.tensors[f"{module}.lora_B.weight"] @ adapter.tensors[f"{module}.lora_A.weight"]


@pytest.mark.parametrize("method", IN_PEFT)
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)])
def test_equals_peft(
    method: str, weights: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one module: PEFT draws for its modules in the model's order, we in the adapter's
    target = r"model\.layers\.0\.self_attn\.q_proj"
    model, adapters = pair(
        lora.LoraConfig(rank=4, alpha=8, target_modules=target), lora.LoraConfig(rank=4, alpha=2, target_modules=target)
    )
    for name, adapter in adapters:
        save_adapter(tmp_path / name, adapter, describe_base(model, "x"), dtype=None)
    oracle: Any = peft.PeftModel.from_pretrained(
        model, str(tmp_path / "a"), adapter_name="a", autocast_adapter_dtype=False
    )
    oracle.load_adapter(str(tmp_path / "b"), adapter_name="b", autocast_adapter_dtype=False)
    _seed_before_pruning(monkeypatch, 3)
    oracle.add_weighted_adapter(["a", "b"], list(weights), "c", combination_type=IN_PEFT[method], density=0.4)
    layer = oracle.base_model.model.model.layers[0].self_attn.q_proj
    expected = layer.get_delta_weight("c").double()
    ours = combine(adapters, CombineConfig(method=method, weights=weights, density=0.4, seed=3))  # type: ignore[arg-type]
    torch.testing.assert_close(update(ours, "model.layers.0.self_attn.q_proj"), expected, rtol=1e-5, atol=1e-6)


def _seed_before_pruning(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """PEFT draws from torch's global generator, from which the new adapter's start was drawn before."""
    kind = peft.tuners.lora.LoraModel
    merge = kind._generalized_task_arithmetic_weighted_adapter

    def seeded(self: Any, *args: Any) -> Any:
        torch.manual_seed(seed)
        return merge(self, *args)

    monkeypatch.setattr(kind, "_generalized_task_arithmetic_weighted_adapter", seeded)


def test_add_and_average_are_exact_for_any_ranks_and_scales(tmp_path: Path) -> None:
    _, adapters = pair(
        lora.LoraConfig(rank=2, alpha=8, rank_pattern={"k_proj": 3}),
        rslora.RsLoraConfig(rank=5, alpha=3, target_modules=("q_proj", "up_proj")),
    )
    added = combine(adapters, CombineConfig(weights=(2.0, 1.0)))
    mean = combine(adapters, CombineConfig(method="average", weights=(2.0, 1.0)))
    (_, one), (_, other) = adapters
    for module in one.targets:
        expected = 2 * update(one, module) + (update(other, module) if module in other.targets else 0)
        torch.testing.assert_close(update(added, module), expected)
        torch.testing.assert_close(update(mean, module), expected / 3)
    assert added.targets["model.layers.0.self_attn.q_proj"][0] == 7
    assert added.targets["model.layers.0.self_attn.k_proj"][0] == 3


def test_a_single_adapter_is_reweighted() -> None:
    _, adapters = pair(lora.LoraConfig(rank=2), lora.LoraConfig(rank=2))
    half = combine(adapters[:1], CombineConfig(weights=(0.5,)))
    for module in half.targets:
        torch.testing.assert_close(update(half, module), 0.5 * update(adapters[0][1], module))


def test_refusals_come_at_once() -> None:
    _, adapters = pair(
        lora.LoraConfig(rank=2, target_modules=("q_proj",), modules_to_save=("lm_head",)),
        lora.LoraConfig(rank=4, target_modules=("q_proj",), modules_to_save=("lm_head",)),
    )
    with pytest.raises(ModelError) as refused:
        combine(adapters, CombineConfig(method="ties", weights=(1.0,)))
    text = str(refused.value)
    assert "2 adapters and 1 weights" in text
    assert "ties needs equal ranks" in text
    assert "a copy of lm_head of their own" in text

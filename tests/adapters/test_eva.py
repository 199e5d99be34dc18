"""EVA against PEFT's own, and against the principal components it stands for."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from typing import Any

import peft
import peft.tuners.lora.eva as peft_eva
import pytest
import torch
from peft.tuners.lora import EvaConfig
from peft.utils.incremental_pca import IncrementalPCA

from lowrank.adapters.bank import Bank
from lowrank.adapters.routing import ForwardContext
from lowrank.adapters.variants import eva
from lowrank.adapters.variants.eva import Components
from lowrank.adapters.variants.eva import EvaConfig as Eva
from lowrank.data.batching.dataloader import DataConfig, DataLoader
from lowrank.models.base import Base
from lowrank.models.loading.quantize_on_load import pack_in_place
from lowrank.segments import Segment
from lowrank.settings import configs_in
from lowrank.train.calibration_pass import calibration_passes
from lowrank.train.engine import Engine
from tests.tiny_models import make_base, make_model, random_step

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def dataloader_of(segments: list[Segment], batch_size: int) -> DataLoader:
    return DataLoader([[segment] for segment in segments], DataConfig(batch_size=batch_size), seed=0)  # type: ignore[arg-type]


def by_input(ranks: dict[str, int]) -> dict[str, list[int]]:
    """Query, key and value get one input, so their components are equally good; which gets one more is chance."""
    found: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        if rank:
            found.setdefault(re.sub("[qkv]_proj", "qkv_proj", name), []).append(rank)
    return {name: sorted(each) for name, each in found.items()}


@pytest.mark.parametrize("use_label_mask", [True, False])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_ranks_and_directions_are_pefts(rho: float, use_label_mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch over and over, so that both have seen the same when they stop. Both estimate singular vectors by a few
    power iterations; of a random model, whose values lie close together, it takes many for them to meet."""
    monkeypatch.setattr(eva, "_NITER", 60)
    monkeypatch.setattr(peft_eva, "IncrementalPCA", partial(IncrementalPCA, lowrank_niter=60))
    model = make_model("llama", torch.float32)
    step = random_step(0, [40, 40, 40])
    config = peft.LoraConfig(
        r=4,
        target_modules=list(TARGETS),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho, use_label_mask=use_label_mask),
    )
    token = torch.stack([torch.from_numpy(segment.token_L) for segment in step])
    learned = torch.stack([torch.from_numpy(segment.weight_L) for segment in step]) != 0
    batch = {"input_ids": token, "labels": torch.where(learned, token, -100), "attention_mask": torch.ones_like(token)}
    theirs = peft_eva.get_eva_state_dict(model, [batch], config, show_progress_bar=False)
    base = Base(make_model("llama", torch.float32), None, "llama")
    base.set_layout("packed")
    engine = Engine(base, Bank(base), 4096)
    ours: Any = Eva(rank=4, rho=rho, use_label_mask=use_label_mask, target_modules=TARGETS)
    slot = engine.bank.add(ours, seed=0, calibration=lambda: calibration_passes(engine, dataloader_of(step, 3)))
    found = engine.bank.slots[slot]
    ranks = {name: rank for name, (rank, _) in found.ranks.items()}
    assert by_input({name: len(rows) for name, rows in theirs.items()}) == by_input(ranks)
    for name, layer in found.layers.items():
        A, B = layer.masters["lora_A"].detach(), layer.masters["lora_B"]
        # singular vectors have no sign of their own
        same = min(len(A), len(theirs[name]))
        torch.testing.assert_close(A[:same].abs(), theirs[name][:same].abs().float(), rtol=0, atol=2e-3)
        assert not B.any()
        assert layer.scale == pytest.approx(2.0)
    if rho > 1:
        assert len(Counter(ranks.values())) > 1
        assert sum(len(rows) for rows in theirs.values()) == 4 * len(theirs)


def test_components_of_batches_are_those_of_all_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(600, 24, generator=generator) * torch.linspace(3, 0.1, 24) + torch.randn(24, generator=generator)
    components = Components(24)
    for part in x_ND.split([150, 50, 200, 200]):
        components.add(part)
    centered = (x_ND - x_ND.mean(0)).double()
    _, strength, right = torch.linalg.svd(centered, full_matrices=False)
    torch.testing.assert_close(
        components.explained_C.double(), strength.square() / centered.square().sum(), rtol=1e-4, atol=1e-6
    )
    cosine = (components.direction_CD.double() * right).sum(1).abs()
    assert cosine[:20].min() > 0.999


@pytest.mark.parametrize(("family", "storage"), [("gpt2", "int8"), ("jamba", "dense"), ("qwen3_moe", "nf4")])
def test_other_layouts_and_storages(family: str, storage: str) -> None:
    """A padded base, transposed layers, packed ones. It begins as the base."""
    base = make_base(family, torch.float32)
    pack_in_place(base.model, configs_in("lowrank.models.storages")[storage]())  # type: ignore[arg-type]
    engine = Engine(base, Bank(base), 64)
    segments = random_step(1, [20, 9, 30, 14])
    config: Any = Eva(rank=3)
    slot = engine.bank.add(config, seed=0, calibration=lambda: calibration_passes(engine, dataloader_of(segments, 2)))
    token, logits = torch.arange(5, 17)[None], []
    with base.using_attention(base.own_attention), torch.no_grad():
        for ranges in ((), ((slot, 0, 12),)):
            with engine.bank.routing.using(ForwardContext(12, ranges)):
                logits.append(base.model(token).logits)
    assert torch.equal(*logits)
    ranks = [rank for rank, _ in engine.bank.slots[slot].ranks.values()]
    assert max(ranks) <= 6
    assert not any(module._forward_pre_hooks for module in base.model.modules())

"""A base in host memory, whose layers come to the device one by one: the bits of a whole one, two layers at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.errors import ModelError
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load
from lowrank.models.streamed import Streamed
from lowrank.ranks import ALONE
from tests.checkpoint_folder import save_checkpoint_folder
from tests.models.sharded_ranks import STORAGES, base_of, differing, trained
from tests.tiny_models import FAMILIES, make_engine, random_step

CPU = torch.device("cpu")


def compare(family: str, storage: str, dtype: torch.dtype = torch.float32) -> None:
    base = base_of(family, storage, dtype, Streamed(CPU))
    assert differing(trained(base, ALONE), trained(base_of(family, storage, dtype), ALONE)) == []


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_storage_gives_the_bits_of_a_whole_base(storage: str, dtype: torch.dtype) -> None:
    """LoRA with dropout, and DoRA, which reads the weights between steps; steps, an evaluation, log-probabilities."""
    compare("llama", storage, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["dense", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, storage: str) -> None:
    try:
        base_of(family, storage, torch.float32)
    except ModelError:
        pytest.skip("refused whole, too")
    compare(family, storage)


@pytest.mark.parametrize("policy", ["none", "selective", "full", 2])
def test_two_layers_at_a_time(policy: Any, tmp_path: Path) -> None:
    """Whatever is computed again. Between passes, what is on the device is what the next one begins with."""
    save_checkpoint_folder(tmp_path, num_hidden_layers=6)
    found: list[dict[str, torch.Tensor]] = []
    for placement in (None, Streamed(CPU)):
        config = ModelConfig(path=str(tmp_path), dtype="float32", device="cpu", storage="nf4",  # type: ignore[arg-type]
                             activation_checkpointing=policy)  # fmt: skip
        base = load(config, placement=placement)
        engine, (slot,) = make_engine(base, LoraConfig(rank=4))
        engine.forward_backward({slot: random_step(0, (9, 12))})
        found.append({name: each.grad for name, each in engine.bank.parameters(slot).items() if each.grad is not None})
    assert differing(*found) == []
    assert placement is not None
    sizes = [block.size for block in placement._blocks]
    assert len(found[0]) == 6 * 7 * 2
    assert placement.most_on_device == 2 * max(sizes) < sum(sizes)
    there = [block.is_there for block in placement._blocks]
    assert there == [True, *[False] * 5] or there == [True, True, *[False] * 4]


def test_what_an_adapter_would_copy_out_of_a_layer_is_refused() -> None:
    base = base_of("llama", "dense", torch.float32, Streamed(CPU))
    with pytest.raises(ModelError, match=r"mlp\.up_proj: the device does not hold it all the time.*replicated"):
        make_engine(base, LoraConfig(rank=2, modules_to_save=("mlp.up_proj",)))
    make_engine(base_of("llama", "dense", torch.float32, Streamed(CPU)), LoraConfig(modules_to_save=("lm_head",)))

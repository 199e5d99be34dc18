"""Pictures on packed bases, and divided among several processes: the bits of one process, the losses of the
weights that were packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.config import RunConfig
from lowrank.media.processor import processor_of
from lowrank.models.checks.media_isolation import give_media_encoder
from lowrank.models.config import ModelConfig
from lowrank.models.layers import is_outside, language_model
from lowrank.models.loading.pretrained import load
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.models.storages.packed import PackedLinear
from lowrank.pipelines.launch import train
from lowrank.pipelines.train import train as train_here
from tests.media_rows import segments_in
from tests.pipelines.forked import forked_processes
from tests.pipelines.live_runs import weights
from tests.tiny_models import make_engine, pretend_learned


def test_two_processes_learn_what_one_does(world: Path, tmp_path: Path) -> None:
    """With an adapter on the tower, on a packed base."""

    def settings(out: str) -> dict[str, Any]:
        everywhere = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
        return {
            "model": {"path": str(world / "model"), "dtype": "float32", "device": "cpu", "storage": {"type": "nf4"}},
            "data": {"train": [str(world / "mllm.json")], "batch_size": 2},
            "output_dir": str(tmp_path / out),
            "micro_batch_tokens": 400,
            "max_steps": 3,
            "jobs": [
                {"name": "a", "adapter": {"rank": 4, "dropout": 0.1, **everywhere}},
                {"name": "b", "adapter": {"rank": 2}},
            ],
        }

    with forked_processes() as ranks:
        train(RunConfig(**settings("two"), devices=2, parallelism="data"))
    assert len(ranks) == 2
    train_here(RunConfig(**settings("one"), lanes=2))
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert any("visual" in name for name in one)
    assert two.keys() == one.keys()
    assert all(torch.equal(two[name], one[name]) for name in one)


@pytest.mark.parametrize("towers", [False, True])
@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8", "hqq"])
def test_a_packed_base_learns_what_its_weights_say(storage: str, towers: bool, world: Path) -> None:
    """Losses and gradients are those of a dense base with the weights that the packed one stands for."""

    def engine_on(**given: Any) -> tuple[Any, Any, int, list[Any]]:
        config = ModelConfig(path=str(world / "model"), dtype="float32", device="cpu", **given)
        tokenizer = load_tokenizer(config)
        base, processor = load(config, tokenizer=tokenizer, notify=lambda _: None), processor_of(tokenizer)
        assert processor is not None
        give_media_encoder(base, processor, "auto")
        engine, (slot,) = make_engine(base, LoraConfig(rank=2, freeze_vision_tower=False), micro_batch_tokens=400)
        pretend_learned(engine, slot, seed=1)
        return base, engine, slot, segments_in(tokenizer, world / "mllm.json")

    packed, engine, slot, segments = engine_on(storage={"type": storage, "towers": towers})
    dense, other, same, _ = engine_on()
    layers = {name: each for name, each in packed.model.named_modules() if isinstance(each, PackedLinear)}
    language, _ = language_model(packed.model)
    assert any(is_outside(name, language) for name in layers) == towers
    for name, layer in layers.items():
        plain = dense.model.get_submodule(name)
        with torch.no_grad():
            plain.weight.copy_(layer.dense_weight())
    assert engine.forward_backward({slot: segments})[slot].loss == pytest.approx(
        other.forward_backward({same: segments})[same].loss, abs=2e-6
    )
    gradients, expected = engine.bank.parameters(slot), other.bank.parameters(same)
    assert any("visual" in name for name in gradients)
    for name, parameter in gradients.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5)

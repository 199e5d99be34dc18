"""float16: gradients too small for it are learned from all the same, and an overflow costs a step, not the job."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.config import RunConfig
from lowrank.pipelines.train import train
from lowrank.train.loss_scale import STEPS_TO_GROW, LossScale, scale_for
from tests.checkpoint_folder import save_checkpoint_folder
from tests.tiny_models import make_base, make_engine, random_step


def trained(dtype: torch.dtype, scale: float | None) -> dict[str, torch.Tensor]:
    """The adapter after a few steps; the head is so flat that gradients are below float16's smallest number."""
    base = make_base("llama", dtype)
    base.model.lm_head.weight.data.mul_(1e-4)
    engine, (slot,) = make_engine(base, LoraConfig(rank=2), learning_rate=1e-3, eps=1e-30, max_grad_norm=None)
    job = engine.jobs[slot]
    assert (job.scale is None) is (dtype != torch.float16)
    if scale is not None and job.scale is not None:
        job.scale.value = scale
    for step in range(6):
        engine.forward_backward({slot: random_step(step, [9, 20])})
        assert not engine.optim_step(slot, 1e-3).skipped
    return {name: value.detach().clone() for name, value in job.parameters.items() if "lora_B" in name}


def test_small_gradients_are_not_lost() -> None:
    wide = trained(torch.float32, None)
    scaled, plain = trained(torch.float16, None), trained(torch.float16, 1.0)
    for name, expected in wide.items():
        assert torch.nn.functional.cosine_similarity(scaled[name].flatten(), expected.flatten(), dim=0) > 0.95, name
    lost = [torch.nn.functional.cosine_similarity(plain[name].flatten(), wide[name].flatten(), dim=0) for name in wide]
    assert min(lost) < 0.8, "without a scale this test would not need one"


def test_an_overflow_halves_the_scale_of_its_job_alone() -> None:
    engine, (first, second) = make_engine(make_base("llama", torch.float16), LoraConfig(rank=2), LoraConfig(rank=2))
    jobs = [engine.jobs[first], engine.jobs[second]]
    assert jobs[0].scale is not None
    assert jobs[1].scale is not None
    jobs[0].scale.value = 2.0**40
    before = {name: value.detach().clone() for name, value in jobs[0].parameters.items()}
    engine.forward_backward({first: random_step(0, [9, 20]), second: random_step(1, [12])})
    updated = engine.optim_step(first, 1e-3), engine.optim_step(second, 1e-3)
    assert [each.skipped for each in updated] == [True, False]
    assert updated[0].loss_scale == jobs[0].scale.value == 2.0**39
    assert updated[1].loss_scale is None
    assert all(torch.equal(value, before[name]) for name, value in jobs[0].parameters.items())


def test_it_grows_after_many_steps_and_never_below_one() -> None:
    scale = LossScale(value=8.0)
    for _ in range(STEPS_TO_GROW):
        scale.grow()
    assert (scale.value, scale.good_steps) == (16.0, 0)
    scale = LossScale(value=1.5)
    assert scale.shrink()
    assert scale.value == 1.0
    assert not scale.shrink(), "the gradient itself is not finite"
    assert scale_for(torch.bfloat16) is None


def run(folder: Path, **more: object) -> dict[str, object]:
    model = folder.parent / "model"
    if not model.exists():
        save_checkpoint_folder(model)
    settings = {
        "model": {"path": str(model), "dtype": "float16", "attention": "packed", "memory_efficient_modules": False},
        "data": {"train": ["lowrank/demo"], "max_samples": 16, "batch_size": 2},
        "output_dir": str(folder),
        "save_steps": 2,
        **more,
    }
    return train(RunConfig.model_validate(settings))


@pytest.mark.parametrize("tuning", ["adapter", "full"])
def test_a_float16_run_goes_on_to_the_bit(tuning: str, tmp_path: Path) -> None:
    """The scale is in the checkpoint."""
    run(tmp_path / "whole", tuning=tuning, max_steps=4, schedule="constant")
    run(tmp_path / "cut", tuning=tuning, max_steps=2, schedule="constant")
    run(tmp_path / "cut", tuning=tuning, max_steps=4, schedule="constant", resume=True)
    name = "model.safetensors" if tuning == "full" else "adapter_model.safetensors"
    one, other = ((tmp_path / each / "default" / "last" / name).read_bytes() for each in ("whole", "cut"))
    assert one == other


def test_scale_is_plain_json() -> None:
    assert LossScale(**dataclasses.asdict(LossScale(4.0, 3))) == LossScale(4.0, 3)

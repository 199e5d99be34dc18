"""Layer by layer: what of a 16-bit base is trained at a time, and going on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowrank.adapters.bank import Bank
from lowrank.batches import BASE_SLOT
from lowrank.config import validate_settings
from lowrank.errors import ConfigError
from lowrank.objectives.sft import SFTConfig
from lowrank.pipelines.train import train
from lowrank.train.engine import Engine
from lowrank.train.optimizers.badam import BAdamConfig
from tests.tiny_models import make_base, random_step


def test_one_layer_at_a_time_is_trained_and_kept_wide() -> None:
    base = make_base("llama", torch.bfloat16)
    base.model.requires_grad_(True)
    before = {name: value.detach().clone() for name, value in base.model.named_parameters()}
    engine = Engine(base, Bank(base), 4096)
    settings: Any = BAdamConfig(switch_interval=3, learning_rate=1e-2)
    engine.add(BASE_SLOT, SFTConfig().build(), settings, seed=0, neftune_alpha=0.0)
    job = engine.jobs[BASE_SLOT]
    moved: list[set[str]] = []
    for step in range(6):
        last = {name: value.detach().clone() for name, value in base.model.named_parameters()}
        layer = "model.layers.1." if step < 3 else "model.layers.0."
        for name, weight in base.model.named_parameters():
            master = job.parameters[name]
            assert weight.requires_grad == master.requires_grad == name.startswith(layer)
            assert master.dtype == (torch.float32 if name.startswith(layer) else torch.bfloat16)
            assert (master.data_ptr() == weight.data_ptr()) != name.startswith(layer)
        engine.forward_backward({BASE_SLOT: random_step(0, [20, 30])})
        assert {name for name, each in job.parameters.items() if each.grad is not None} == {
            name for name in job.parameters if name.startswith(layer)
        }
        engine.optim_step(BASE_SLOT, 1e-2)
        moved.append({name for name, value in base.model.named_parameters() if not torch.equal(value, last[name])})
        assert moved[-1] == {name for name in job.parameters if name.startswith(layer)}
    state = {name for name, each in job.parameters.items() if each in job.optimizer.state}
    assert state == set(), "moments start anew with each layer"
    after = dict(base.model.named_parameters())
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_goes_on_to_the_same_bits(dtype: str, tmp_path: Path) -> None:
    """Stopped in the middle of a block's turn that is not the first."""

    def run(name: str, steps: int, **more: Any) -> dict[str, torch.Tensor]:
        config = {
            "model": {"path": "lowrank/tiny", "dtype": dtype},
            "tuning": "full",
            "data": {"train": {"path": "lowrank/demo", "max_samples": 16}, "batch_size": 2},
            "optimizer": {"type": "badam", "switch_interval": 2, "switch_mode": "random", "learning_rate": 1e-3},
            "schedule": "constant",
            "max_steps": steps,
            "output_dir": str(tmp_path / name),
            **more,
        }
        train(validate_settings(config))
        return load_file(tmp_path / name / "default" / "last" / "model.safetensors")

    whole = run("whole", 7)
    run("cut", 3)
    resumed = run("cut", 7, resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_it_cannot_do_is_said() -> None:
    settings = {"model": "m", "data": "d", "output_dir": "o", "optimizer": "badam"}
    with pytest.raises(ConfigError, match=r"optimizer.type: badam is for tuning: full"):
        validate_settings(settings)
    with pytest.raises(ConfigError, match=r"trains layer by layer, and the value head .* is in none"):
        validate_settings(settings | {"tuning": "full", "objective": "reward"})
    base = make_base("llama", torch.float32)
    parameters = dict(base.model.named_parameters())
    with pytest.raises(ConfigError, match=r"optimizer.start_block: 7, and there are 2 blocks"):
        BAdamConfig(start_block=7).build(parameters)

"""Updates within the backward pass: the same bits as after it, and the gradients are never there at once."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowrank.adapters.bank import Bank
from lowrank.batches import BASE_SLOT
from lowrank.config import validate_settings
from lowrank.errors import ConfigError, ModelError
from lowrank.models.base import Base
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.objectives.reward import RewardConfig
from lowrank.objectives.sft import SFTConfig
from lowrank.pipelines.train import train
from lowrank.planning.memory import StepMemory
from lowrank.planning.simulation import PlannedJob
from lowrank.segments import CHOSEN, REJECTED, Segment
from lowrank.settings import configs_in
from lowrank.train.engine import Engine
from tests.tiny_models import make_base, random_step

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1},
    "adamw_8bit": {},
    "adafactor": {},
    "sgd": {"momentum": 0.5},
    "galore": {"rank": 4, "update_interval": 2},
    "galore_8bit": {"rank": 4, "update_interval": 2},
    "apollo": {"rank": 4, "update_interval": 2},
}


def engine_of(name: str, dtype: torch.dtype, layerwise: bool, objective: Any = None, **changes: Any) -> Engine:
    base = make_base("llama", dtype, tie_word_embeddings=True)
    base.model.requires_grad_(True)
    engine = Engine(base, Bank(base), 4096)
    options = {"max_grad_norm": None, "learning_rate": 1e-2, **OPTIMIZERS[name], **changes}
    settings = configs_in("lowrank.train.optimizers")[name](layerwise=layerwise, **options)
    engine.add(BASE_SLOT, (objective or SFTConfig()).build(), settings, seed=0, neftune_alpha=0.0)  # type: ignore[arg-type]
    return engine


def step(engine: Engine, segments: list[Segment]) -> tuple[float, float, bool]:
    forwarded = engine.forward_backward({BASE_SLOT: segments}, {BASE_SLOT: 1e-2})
    updated = engine.optim_step(BASE_SLOT, 1e-2)
    return forwarded[BASE_SLOT].loss, updated.grad_norm, updated.skipped


@pytest.mark.parametrize(
    ("dtype", "passes", "activation_checkpointing"),
    [(torch.float32, 1, "full"), (torch.float32, 3, "none"), (torch.bfloat16, 1, "none"), (torch.bfloat16, 3, "full")],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bits_are_those_of_updates_afterwards(
    name: str, dtype: torch.dtype, passes: int, activation_checkpointing: str
) -> None:
    """Tied embeddings, several steps, and steps of several passes, of which only the last one updates."""
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    engines = [engine_of(name, dtype, layerwise) for layerwise in (False, True)]
    for engine in engines:
        engine.micro_batch_tokens = 4096 if passes == 1 else 20
        set_activation_checkpointing(engine.base.model, activation_checkpointing)
    for number in range(4):
        whole, ours = (step(engine, random_step(number, [20, 17, 12])) for engine in engines)
        assert whole[0] == ours[0]
        assert ours[1] == pytest.approx(whole[1], rel=1e-5)
    before, after = (dict(engine.base.model.named_parameters()) for engine in engines)
    assert all(torch.equal(before[key], after[key]) for key in before)
    start = make_base("llama", dtype, tie_word_embeddings=True).model.get_input_embeddings().weight
    assert not torch.equal(after["model.embed_tokens.weight"], start)


def test_gradients_are_never_there_at_once() -> None:
    engine = engine_of("adamw", torch.bfloat16, True)
    masters, most = engine.jobs[BASE_SLOT].parameters, [0]

    def count(_: torch.Tensor) -> None:
        most[0] = max(most[0], sum(each.grad is not None for each in masters.values()))

    for weight in engine.base.model.parameters():
        weight.register_hook(count)
    step(engine, random_step(0, [20, 30]))
    assert most[0] == 0  # whenever one comes, those before it are gone
    assert all(each.grad is None for each in masters.values())


def test_what_is_not_finite_updates_nothing() -> None:
    engine = engine_of("adamw", torch.float32, True)
    model = engine.base.model
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    broken = next(iter(model.parameters()))
    with torch.no_grad():
        value = broken[5].clone()
        broken[5] = float("nan")
    segments = [Segment(each.token_L * 0 + 5, each.weight_L) for each in random_step(0, [20])]
    assert step(engine, segments)[2]
    with torch.no_grad():
        broken[5] = value
    assert all(torch.equal(value, kept[name]) for name, value in model.named_parameters())
    assert not engine.jobs[BASE_SLOT].optimizer.state


def test_a_gradient_that_is_not_finite_leaves_its_parameter() -> None:
    engine = engine_of("adamw", torch.float32, True)
    name, weight = next(each for each in engine.base.model.named_parameters() if "down_proj" in each[0])
    before = weight.detach().clone()
    handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    loss, _, skipped = step(engine, random_step(0, [20]))
    assert skipped, "it counts as a step that failed"
    assert loss == loss, name
    assert torch.equal(weight, before)
    handle.remove()
    assert not step(engine, random_step(0, [20]))[2]
    assert not torch.equal(weight, before)


def test_where_memory_runs_out_before_anything_is_updated_the_step_is_done_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engines = [engine_of("adamw", torch.float32, True) for _ in range(2)]
    segments = random_step(0, [20, 17, 12])
    hidden, described = Base.hidden, []

    def short(base: Base, batch: Any, **options: Any) -> torch.Tensor:
        if batch.num_tokens > 25:
            raise torch.OutOfMemoryError
        return hidden(base, batch, **options)

    step(engines[0], segments)
    engines[1].notify = described.append
    monkeypatch.setattr(Base, "hidden", short)
    step(engines[1], segments)
    assert "done again" in described[0]
    whole, ours = (dict(engine.base.model.named_parameters()) for engine in engines)
    for name in whole:
        torch.testing.assert_close(ours[name], whole[name], rtol=1e-3, atol=1e-4)


def test_a_step_without_a_rate_waits_for_the_update() -> None:
    engine = engine_of("adamw", torch.float32, True)
    step(engine, random_step(0, [20]))
    before = {name: value.detach().clone() for name, value in engine.base.model.named_parameters()}
    engine.forward_backward({BASE_SLOT: random_step(1, [20])})
    assert all(torch.equal(value, before[name]) for name, value in engine.base.model.named_parameters())
    gradients = [each.grad for each in engine.jobs[BASE_SLOT].parameters.values() if each.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    assert engine.optim_step(BASE_SLOT, 1e-2).grad_norm == pytest.approx(norm)


def test_a_removed_job_leaves_nothing_behind() -> None:
    engine = engine_of("adamw", torch.float32, True)
    step(engine, random_step(0, [20]))
    optimizer = weakref.ref(engine.jobs[BASE_SLOT].optimizer)
    engine.remove(BASE_SLOT)
    gc.collect()
    assert optimizer() is None


def test_a_value_head_is_updated_with_the_rest() -> None:
    pairs = [
        Segment(each.token_L, each.weight_L, pair=index // 2, role=(CHOSEN, REJECTED)[index % 2])
        for index, each in enumerate(random_step(0, [9, 9]))
    ]
    engines = [engine_of("adamw", torch.float32, layerwise, RewardConfig()) for layerwise in (False, True)]
    for engine in engines:
        step(engine, pairs)
    whole, ours = (engine.jobs[BASE_SLOT].parameters for engine in engines)
    assert all(torch.equal(whole[name], ours[name]) for name in whole)


def test_what_it_cannot_be_combined_with_is_said() -> None:
    kinds = configs_in("lowrank.train.optimizers")
    with pytest.raises(ConfigError, match="set max_grad_norm: null"):
        kinds["galore"](layerwise=True)
    with pytest.raises(ConfigError, match="looks at more than one parameter at a time"):
        kinds["muon"](layerwise=True, max_grad_norm=None)
    with pytest.raises(ModelError, match=r"set model\.dtype: bfloat16"):
        engine_of("adamw", torch.float16, True)
    config = {
        "model": "lowrank/tiny",
        "data": {"train": "x.json"},
        "output_dir": "runs/x",
        "optimizer": {"type": "adamw", "layerwise": True, "max_grad_norm": None},
    }
    with pytest.raises(ConfigError, match=r"optimizer\.layerwise is for tuning: full and freeze"):
        validate_settings(config)


def test_the_plan_counts_no_whole_gradient(tmp_path: Path) -> None:
    base = make_base("llama", torch.bfloat16, num_hidden_layers=6, hidden_size=128, intermediate_size=256)
    base.model.save_pretrained(tmp_path / "model")
    model = validate_settings(
        {"model": {"path": str(tmp_path / "model"), "device": "cpu"}, "data": {"train": "x"}, "output_dir": "runs/x"}
    ).model
    planned = []
    for layerwise in (False, True):
        settings = configs_in("lowrank.train.optimizers")["galore"](rank=4, layerwise=layerwise, max_grad_norm=None)
        job = PlannedJob(None, SFTConfig().build(), settings, random_step(0, [10]))  # type: ignore[arg-type]
        planned.append(StepMemory(model, [job]).step(4096, "none"))
    whole, ours = planned
    count = sum(each.numel() for each in base.model.parameters())
    assert whole.optimizer == ours.optimizer > 0
    assert whole.total - ours.total > 4 * count / 2, (whole, ours)


def test_a_run_stops_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def run(name: str, steps: int, **more: Any) -> dict[str, torch.Tensor]:
        config = {
            "model": {"path": "lowrank/tiny", "dtype": "bfloat16", "device": "cpu"},
            "tuning": "full",
            "optimizer": {"type": "galore", "rank": 4, "layerwise": True, "max_grad_norm": None},
            "schedule": "constant",
            "data": {"train": str(tmp_path / "rows.json"), "batch_size": 2},
            "max_steps": steps,
            "output_dir": str(tmp_path / name),
            **more,
        }
        train(validate_settings(config))
        return load_file(tmp_path / name / "default" / "last" / "model.safetensors")

    rows = [f'{{"instruction": "say {number}", "output": "{number} it is"}}' for number in range(20)]
    (tmp_path / "rows.json").write_text("[" + ",".join(rows) + "]")
    whole = run("whole", 6)
    run("cut", 3)
    rest = run("cut", 6, resume=True)
    assert all(torch.equal(whole[name], rest[name]) for name in whole)

"""Schedules against transformers, optimizers against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from lowrank.errors import ConfigError
from lowrank.train.optimizers.adamw import AdamWConfig
from lowrank.train.optimizers.sgd import SGDConfig
from lowrank.train.schedule import ScheduleConfig, length_notice

THEIRS = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "cosine_with_restarts": "cosine_with_restarts",
    "inverse_sqrt": "inverse_sqrt",
}


def theirs(name: str, warmup: int, num_steps: int, taken: int, **options: Any) -> list[float]:
    """transformers' learning rates, peak 1, of the first `taken` steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps, scheduler_specific_kwargs=options
    )
    rates = []
    for _ in range(taken):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7, 50])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
@pytest.mark.parametrize("name", THEIRS)
def test_schedules_are_transformers(name: str, num_steps: int, warmup: int) -> None:
    """Every step of the job, also of one that ends within its warmup."""
    config = ScheduleConfig(type=name, warmup_steps=warmup)
    ours = [config.factor(step, num_steps) for step in range(num_steps)]
    assert ours == pytest.approx(theirs(THEIRS[name], warmup, num_steps, num_steps), abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "step", "rates"),
    [
        ({"type": "linear"}, 3, "from 1.0e-04 (step 3) to 1.3e-04 (step 4)"),
        ({"type": "linear"}, 0, None),
        ({"type": "constant"}, 3, None),
        ({"type": "constant", "warmup_ratio": 0.5}, 2, "from 1.0e-04 (step 2) to 1.0e-04 (step 3)"),
        ({"type": "inverse_sqrt", "warmup_steps": 2}, 3, None),
        ({"type": "warmup_stable_decay", "num_stable_steps": 3}, 3, None),
    ],
)
def test_another_length_is_told_where_steps_had_other_rates(settings: Any, step: int, rates: str | None) -> None:
    """Of 4 steps, of which `step` are taken, and then 8."""
    text = length_notice(ScheduleConfig(**settings), 2e-4, step, 4, 8)
    assert (rates is None) == (text is None)
    assert rates is None or rates in str(text)
    assert length_notice(ScheduleConfig(**settings), 2e-4, step, 4, 4) is None


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts"])
def test_after_the_end_the_rate_stays_down(name: str) -> None:
    """transformers' cosine would rise again."""
    config = ScheduleConfig(type=name, warmup_steps=2)
    assert [config.factor(step, 10) for step in range(10, 30)] == [0.0] * 20


@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_restarts(cycles: int) -> None:
    config = ScheduleConfig(type="cosine_with_restarts", warmup_steps=3, num_cycles=cycles)
    expected = theirs("cosine_with_restarts", 3, 40, 40, num_cycles=cycles)
    assert [config.factor(step, 40) for step in range(40)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5])
def test_cosine_with_a_floor(floor: float) -> None:
    config = ScheduleConfig(type="cosine", warmup_steps=3, min_ratio=floor)
    expected = theirs("cosine_with_min_lr", 3, 40, 41, min_lr_rate=floor)
    assert [config.factor(step, 40) for step in range(41)] == pytest.approx(expected, abs=1e-12)


def test_linear_with_a_floor() -> None:
    config = ScheduleConfig(type="linear", min_ratio=0.2)
    assert [config.factor(step, 4) for step in range(6)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.5])
@pytest.mark.parametrize("num_steps", [1, 7, 33, 100])
def test_warmup_ratio_counts_steps_like_transformers(ratio: float, num_steps: int, tmp_path: Any) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=ratio, use_cpu=True)
    warmup = arguments.get_warmup_steps(num_steps)
    by_ratio = ScheduleConfig(type="linear", warmup_ratio=ratio)
    by_steps = ScheduleConfig(type="linear", warmup_steps=warmup)
    for step in range(num_steps):
        assert by_ratio.factor(step, num_steps) == by_steps.factor(step, num_steps)


def test_one_kind_of_warmup() -> None:
    with pytest.raises(ConfigError, match="give warmup_steps or warmup_ratio, not both"):
        ScheduleConfig(warmup_steps=3, warmup_ratio=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_is_torchs(dtype: torch.dtype) -> None:
    """Every setting arrives: betas, epsilon, decay, rate."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20, generator=generator, dtype=dtype)
    ours, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    config = AdamWConfig(learning_rate=3e-2, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    optimizer = config.build({"weight": ours})
    plain = torch.optim.AdamW([other], lr=3e-2, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    for _ in range(10):
        ours.grad = torch.randn(20, generator=generator, dtype=dtype)
        other.grad = ours.grad.clone()
        optimizer.step()
        plain.step()
    torch.testing.assert_close(ours, other, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
    assert (ours - start).abs().max() > 0.1


def test_sgd_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = SGDConfig(learning_rate=0.5, weight_decay=0.1).build({"weight": parameter})
    parameter.grad = torch.tensor([1.0, 2.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.45, -0.05, 0.95]))


@pytest.mark.parametrize(
    "wrong", [{"learning_rate": 0.0}, {"max_grad_norm": -1.0}, {"weight_decay": -0.1}, {"type": "adamx"}, {"lr": 1e-3}]
)
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AdamWConfig(**wrong)

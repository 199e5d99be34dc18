"""Stages and learning rates of LLaMA-Factory files, beside transformers' own."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from lowrank.compat.llamafactory.keys import Keys
from lowrank.compat.llamafactory.method import SCHEDULES
from tests.compat.llamafactory.files import MINIMAL, read


@pytest.mark.parametrize(
    ("lines", "objective"),
    [
        ("use_dft_loss: true\n", {"type": "sft", "loss_type": "dft"}),
        ("use_asft_loss: true\nasft_alpha: 0.2\n", {"type": "sft", "loss_type": "asft", "asft_alpha": 0.2}),
        ("use_eaft_loss: true\neaft_alpha: 2\n", {"type": "sft", "loss_type": "eaft", "eaft_alpha": 2.0}),
        ("label_smoothing_factor: 0.1\n", {"type": "sft", "label_smoothing": 0.1}),
        (
            "stage: dpo\ndataset: chats\npref_bco_weight: 0.5\nld_alpha: 0.3\nref_model: m/y\n",
            {"type": "dpo", "bco_weight": 0.5, "ld_alpha": 0.3, "reference_model": "m/y"},
        ),
        ("stage: rm\ndataset: chats\n", {"type": "reward", "center_rewards_coefficient": 0.0}),
        (
            "stage: dpo\ndataset: chats\npref_loss: hinge\npref_beta: 0.3\npref_ftx: 0.5\n",
            {"type": "dpo", "loss_type": "hinge", "beta": 0.3, "pref_ftx": 0.5, "label_smoothing": 0.0},
        ),
        (
            "stage: dpo\ndataset: chats\ndpo_label_smoothing: 0.1\n",
            {"type": "dpo", "loss_type": "sigmoid", "beta": 0.1, "pref_ftx": 0.0, "label_smoothing": 0.1},
        ),
        ("stage: dpo\ndataset: chats\npref_loss: orpo\n", {"type": "orpo", "beta": 0.1}),
        (
            "stage: dpo\ndataset: pairs\npref_loss: simpo\npref_beta: 2.0\nsimpo_gamma: 1.2\n",
            {"type": "simpo", "beta": 2.0, "gamma": 1.2},
        ),
        (
            "stage: kto\ndataset: rated\nkto_chosen_weight: 1.5\nkto_rejected_weight: 0.5\n",
            {"type": "kto", "beta": 0.1, "pref_ftx": 0.0, "desirable_weight": 1.5, "undesirable_weight": 0.5},
        ),
    ],
)
def test_stages_on_answers(workplace: Path, lines: str, objective: dict[str, Any]) -> None:
    text = "".join(
        line + "\n"
        for line in MINIMAL.splitlines()
        if not any(line.startswith(key.split(":")[0] + ":") for key in lines.splitlines())
    )
    config, _ = read(workplace, text + lines)
    assert objective.items() <= config.objective.model_dump().items()


def test_stage_ppo(workplace: Path) -> None:
    text = MINIMAL + "stage: ppo\nreward_model: judge\nppo_epochs: 2\nppo_score_norm: true\nppo_whiten_rewards: true\n"
    config, _ = read(workplace, "\n".join(line for line in text.splitlines() if line != "stage: sft") + "\n")
    objective = config.objective.model_dump()
    assert (
        objective
        | {
            "type": "ppo",
            "max_completion_length": 1024,
            "temperature": 0.95,
            "top_p": 0.7,
            "top_k": 50,
            "num_ppo_epochs": 2,
            "score_norm": True,
            "whiten_rewards": True,
            "kl_coef": 0.2,
        }
        == objective
    )
    assert objective["reward_model"].endswith("judge")


def test_pref_ftx_that_is_not_heard_speaks(workplace: Path) -> None:
    text = MINIMAL.replace("dataset: identity", "dataset: chats")
    _, warnings = read(workplace, text + "stage: dpo\npref_loss: simpo\npref_ftx: 0.5\n")
    assert "pref_ftx has no effect with objective simpo" in warnings


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("warmup", ["", "warmup_steps: 7\n", "warmup_ratio: 0.1\n"])
def test_learning_rates_are_those_of_transformers(workplace: Path, name: str, warmup: str) -> None:
    some: dict[str, dict[str, Any]] = {
        "cosine_with_min_lr": {"min_lr": 1e-5},
        "cosine_with_restarts": {"num_cycles": 3},
        "polynomial": {"power": 2.0, "lr_end": 2e-6},
        "warmup_stable_decay": {"num_stable_steps": 9, "num_decay_steps": 30, "min_lr_ratio": 0.1},
    }
    kwargs = some.get(name, {})
    text = MINIMAL + f"lr_scheduler_type: {name}\nmax_steps: 57\n{warmup}"
    text += f"lr_scheduler_kwargs: {json.dumps(kwargs)}\n" if kwargs else ""
    config, _ = read(workplace, text)
    warmup_steps = {"": 0, "warmup_steps: 7\n": 7, "warmup_ratio: 0.1\n": 6}[warmup]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that both numbers of wsd are there
        theirs: Any = get_scheduler(name, optimizer, warmup_steps, 57, scheduler_specific_kwargs=kwargs)
    for step in range(57):
        ours = config.optimizer.learning_rate * config.schedule.factor(step, 57)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15), step
        optimizer.step()
        theirs.step()


def test_a_stable_phase_of_a_third(workplace: Path) -> None:
    """LLaMA-Factory's own number where the file gives none: a third of what comes after the warmup."""
    config, _ = read(workplace, MINIMAL + "lr_scheduler_type: warmup_stable_decay\nwarmup_steps: 6\n")
    factors = [config.schedule.factor(step, 36) for step in range(36)]
    assert factors[6:16] == [1.0] * 10
    assert factors[16] == 1.0 > factors[17]
    assert factors[35] == pytest.approx(0.5 * (1 + math.cos(math.pi * 19 / 20)))


def test_defaults_are_those_of_transformers() -> None:
    from transformers import Seq2SeqTrainingArguments

    theirs = {name: field.default for name, field in Seq2SeqTrainingArguments.__dataclass_fields__.items()}
    renamed = {"optim", "report_to", "output_dir", "num_train_epochs"}  # written differently, meaning the same
    for name, field in Keys.model_fields.items():
        if name in theirs and name not in renamed and not field.is_required():
            ours = field.get_default(call_default_factory=True)
            value = getattr(theirs[name], "value", theirs[name])
            assert (ours or None) == (value or None) or name == "metric_for_best_model", name

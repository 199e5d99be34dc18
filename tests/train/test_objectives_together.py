"""SFT, DPO, KTO and a reward model in one run on one base: none notices another; runs, resumes, and reports."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowrank.train.reference as reference
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.checkpoints.value_head import read_value_head
from lowrank.config import RunConfig
from lowrank.errors import ConfigError, ModelError
from lowrank.objectives import dpo, kto, reward, sft
from lowrank.pipelines.inference import open_inference_model
from lowrank.pipelines.train import train
from lowrank.records import Conversation, Message
from lowrank.report.events import EvalDone, Event, Notice, StepDone
from lowrank.segments import Segment
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.objectives.test_contract import step_for
from tests.tiny_models import make_base, make_engine

OBJECTIVES: dict[str, Any] = {
    "sft": sft.SFTConfig(),
    "dpo": dpo.DPOConfig(),
    "kto": kto.KTOConfig(),
    "reward": reward.RewardConfig(),
}
STEPS = 3


def engine_with(names: list[str], micro_batch_tokens: int) -> tuple[Engine, dict[str, int]]:
    engine, _ = make_engine(make_base("llama"), micro_batch_tokens=micro_batch_tokens)
    slots = {}
    for name in names:
        seed = list(OBJECTIVES).index(name)
        adapter: Any = LoraConfig(rank=4, dropout=0.2)
        slots[name] = engine.bank.add(adapter, seed=seed)
        engine.add(slots[name], OBJECTIVES[name].build(), AdamWConfig(), seed=seed, neftune_alpha=0.0)
    return engine, slots


def run_steps(engine: Engine, slots: dict[str, int]) -> dict[str, Any]:
    """Losses, metrics and final tensors of each job, whose data depend on its name and the step alone."""
    history: dict[str, list[Any]] = {name: [] for name in slots}
    for step in range(STEPS):
        work: dict[int, list[Segment]] = {
            slot: step_for(engine.jobs[slot].objective, 10 * step + list(OBJECTIVES).index(name))
            for name, slot in slots.items()
        }
        forwarded = engine.forward_backward(work)
        for name, slot in slots.items():
            history[name] += [forwarded[slot].loss, *forwarded[slot].metrics.values()]
            engine.optim_step(slot, 1e-2)
    return {
        name: (history[name], {key: value.detach() for key, value in engine.jobs[slot].parameters.items()})
        for name, slot in slots.items()
    }


@pytest.mark.parametrize("micro_batch_tokens", [30, 4096])
def test_none_notices_another(micro_batch_tokens: int) -> None:
    together = run_steps(*engine_with(list(OBJECTIVES), micro_batch_tokens))
    for name in OBJECTIVES:
        history, tensors = run_steps(*engine_with([name], 4096))[name]
        assert together[name][0] == pytest.approx(history, rel=1e-9, abs=1e-12)
        for key, value in tensors.items():
            torch.testing.assert_close(together[name][1][key], value, rtol=0, atol=1e-10)


class Ear:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def report(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None: ...

    def losses(self, name: str) -> list[float]:
        return [event.loss for event in self.events if isinstance(event, StepDone) and event.job == name]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    rows = [(f"Say {n}", f"{n} {n}", f"{n + 1}") for n in range(20)]
    kinds = {
        "chats": [{"prompt": question, "completion": good} for question, good, _ in rows],
        "pairs": [{"prompt": question, "chosen": good, "rejected": bad} for question, good, bad in rows],
        "rated": [
            {"prompt": question, "completion": good if i % 2 else bad, "label": bool(i % 2)}
            for i, (question, good, bad) in enumerate(rows)
        ],
    }
    for name, made in kinds.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return {name: str(tmp_path / f"{name}.jsonl") for name in kinds}


def settings(files: dict[str, str], out: Path, **changes: Any) -> dict[str, Any]:
    shared = {"batch_size": 4, "validation_split": 0.2, "max_length": 64}
    return {
        "model": {"path": "lowrank/tiny", "device": "cpu", "dtype": "float32"},
        "output_dir": out,
        "optimizer": {"learning_rate": 5e-3},
        "adapter": {"rank": 2, "target_modules": ["q_proj", "v_proj"]},
        "max_steps": 4,
        "eval_steps": 2,
        "save_steps": 2,
        "jobs": [
            {"name": "sft", "data": {"train": files["chats"], **shared}},
            {"name": "dpo", "objective": "dpo", "data": {"train": files["pairs"], **shared}},
            {
                "name": "ipo",
                "objective": {"type": "dpo", "loss_type": "ipo"},
                "data": {"train": files["pairs"], **shared},
            },
            {"name": "kto", "objective": "kto", "data": {"train": files["rated"], **shared}},
            {"name": "reward", "objective": "reward", "data": {"train": files["pairs"], **shared}},
        ],
        **changes,
    }


@pytest.mark.slow
def test_a_run_of_all_and_its_resumption(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics are kept; references are computed once; a stopped run goes on to the same bits."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    whole = Ear()
    summary = train(RunConfig(**settings(files, tmp_path / "whole")), reporters=[whole])
    for name in ("dpo", "ipo", "reward"):
        evaluated = [event for event in whole.events if isinstance(event, EvalDone) and event.job == name]
        assert [event.step for event in evaluated] == [2, 4]
        assert 0 <= evaluated[-1].metrics["rewards/accuracies"] <= 1
        assert summary["jobs"][name]["eval_metrics"] == evaluated[-1].metrics
    first = next(event for event in whole.events if isinstance(event, StepDone) and event.job == "dpo")
    assert first.loss == pytest.approx(0.6931, abs=1e-3)  # the reference is where it starts
    assert first.metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any("kl" in line["metrics"] for line in lines if line["event"] == "eval" and line["job"] == "kto")
    notices = [event.text for event in whole.events if isinstance(event, Notice)]
    (reported,) = [text for text in notices if text.startswith("reference log-probabilities")]
    assert (
        "60 segments computed, 0 found" in reported
    )  # pairs once for three jobs, since their answers are rated, and mismatched

    class Stopper(Ear):
        def report(self, event: Event) -> None:
            super().report(event)
            if isinstance(event, StepDone) and event.job == "reward" and event.step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    stopped, rest = Stopper(), Ear()
    given = settings(files, tmp_path / "cut")
    train(RunConfig(**given), reporters=[stopped])
    monkeypatch.setattr(reference.Engine, "logprobs", None)  # all of them are on disk
    train(RunConfig(**given, resume=True), reporters=[rest])
    for job in given["jobs"]:
        name = job["name"]
        assert stopped.losses(name) + rest.losses(name) == whole.losses(name)
        expected = load_file(tmp_path / "whole" / name / "last" / "adapter_model.safetensors")
        for key, value in load_file(tmp_path / "cut" / name / "last" / "adapter_model.safetensors").items():
            assert torch.equal(value, expected[key]), key
    heads = [read_value_head(tmp_path / which / "reward" / "last") for which in ("whole", "cut")]
    assert heads[0] is not None
    assert heads[1] is not None
    assert torch.equal(heads[0], heads[1])
    assert read_value_head(tmp_path / "whole" / "dpo" / "last") is None


def test_only_references_that_the_steps_use_are_computed(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few steps need few; a run that goes on to more computes the others, and is what it would have been at once: to
    rounding, since what is computed together is not the same, and a row of MKL's products for AVX2 depends on how many
    rows there are."""
    given = settings(files, tmp_path / "whole")
    given["jobs"] = [{**given["jobs"][1], "data": {**given["jobs"][1]["data"], "validation_split": 0.0, "eval": []}}]
    given |= {"eval_steps": None, "max_steps": 3}

    def run(cache: str, **changes: Any) -> tuple[list[float], str]:
        monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / cache))
        ear = Ear()
        train(RunConfig(**{**given, **changes}), reporters=[ear])
        notices = [event.text for event in ear.events if isinstance(event, Notice)]
        return ear.losses("dpo"), next(text for text in notices if text.startswith("reference log-probabilities"))

    whole, reported = run("a")
    assert "24 segments computed, 0 found" in reported  # three steps of four pairs, out of twenty pairs
    cut = {"output_dir": tmp_path / "cut", "save_steps": 1}
    first, reported = run("b", **cut, max_steps=1)
    assert "8 segments computed, 0 found" in reported
    rest, reported = run("c", **cut, resume=True)
    assert (
        "24 segments computed, 0 found" in reported
    )  # those of the steps before as well: full training changes the base
    assert first + rest == pytest.approx(whole, rel=1e-6)


def test_a_full_parameter_job_keeps_its_reference(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base changes, what it is compared with does not, also after a resume. A value head is saved with it."""
    given = settings(files, tmp_path / "whole", tuning="full", optimizer={"learning_rate": 1e-4}, schedule="constant")
    given["jobs"] = [given["jobs"][1]]
    whole, first, rest = Ear(), Ear(), Ear()
    train(RunConfig(**given), reporters=[whole])
    train(RunConfig(**{**given, "output_dir": tmp_path / "cut", "max_steps": 2}), reporters=[first])
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "empty"))  # computed anew: before the checkpoint is loaded
    train(RunConfig(**{**given, "output_dir": tmp_path / "cut", "resume": True}), reporters=[rest])
    metrics = [
        [event.metrics["rewards/chosen"] for event in ear.events if isinstance(event, EvalDone)]
        for ear in (whole, rest)
    ]
    assert metrics[0][-1] != 0
    assert metrics[1][-1] == pytest.approx(metrics[0][-1], rel=1e-6)
    given["jobs"] = [{**given["jobs"][0], "name": "reward", "objective": {"type": "reward"}}]
    train(RunConfig(**{**given, "output_dir": tmp_path / "reward"}))
    head = read_value_head(tmp_path / "reward" / "reward" / "last")
    assert head is not None
    assert (tmp_path / "reward" / "reward" / "last" / "model.safetensors").is_file()


@pytest.mark.parametrize("tuning", ["adapter", "full"])
def test_a_saved_reward_model_says_what_it_said_in_training(files: dict[str, str], tmp_path: Path, tuning: str) -> None:
    given = settings(files, tmp_path / "run", tuning=tuning, max_steps=2)
    data = {"train": files["pairs"], "eval": files["pairs"], "batch_size": 4}
    given["jobs"] = [{"name": "rm", "objective": "reward", "data": data}]
    metrics = train(RunConfig(**given))["jobs"]["rm"]["eval_metrics"]
    trained = open_inference_model(str(tmp_path / "run"), which="last", notify=lambda text: None)
    questions = [Message("user", f"Say {n}") for n in range(20)]
    for side, offset in (("chosen", 0), ("rejected", 1)):
        texts = [f"{n} {n}" if side == "chosen" else f"{n + offset}" for n in range(20)]
        chats = [Conversation((question, Message("assistant", text))) for question, text in zip(questions, texts)]
        found = trained.rewards([("rm", chat) for chat in chats])
        assert sum(found) / 20 == pytest.approx(metrics[f"rewards/{side}"], abs=1e-5)
    if tuning == "adapter":
        with pytest.raises(ModelError, match="'base' is no reward model"):
            trained.rewards([("base", chats[0])])


def test_training_of_a_reward_model_goes_on(files: dict[str, str], tmp_path: Path) -> None:
    given = settings(files, tmp_path / "one")
    given["jobs"] = given["jobs"][-1:]
    train(RunConfig(**given))
    saved = tmp_path / "one" / "reward" / "last"
    given["jobs"] = [{**given["jobs"][0], "adapter": {"path": str(saved)}}]
    given = {**given, "output_dir": tmp_path / "two", "max_steps": 1, "optimizer": {"learning_rate": 1e-12}}
    train(RunConfig(**given))
    heads = [read_value_head(each) for each in (saved, tmp_path / "two" / "reward" / "last")]
    torch.testing.assert_close(heads[0], heads[1])


def test_a_stream_and_full_parameters_exclude_each_other(files: dict[str, str], tmp_path: Path) -> None:
    given = settings(files, tmp_path / "run", tuning="full")
    given["jobs"] = [{"name": "a", "objective": "dpo", "data": {"train": files["pairs"], "streaming": True}}]
    with pytest.raises((ConfigError, ValueError), match="objective dpo compares with the base as it was"):
        RunConfig(**given)


def test_dpo_on_a_stream_has_the_same_references(files: dict[str, str], tmp_path: Path) -> None:
    losses = []
    for streaming in (False, True):
        ear = Ear()
        data = {"train": files["pairs"], "batch_size": 20, "shuffle": False, "streaming": streaming}
        given = settings(files, tmp_path / str(streaming), max_steps=2)
        given["jobs"] = [{"name": "a", "objective": "dpo", "data": data}]
        del given["eval_steps"]
        train(RunConfig(**given), reporters=[ear])
        losses.append(ear.losses("a"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)

"""The main path whole: real files, a real checkpoint folder, adapters on disk."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from lowrank.config import RunConfig, validate_settings
from lowrank.data import dataset
from lowrank.data.prepare import prepare
from lowrank.errors import ConfigError, DataError, OutputError
from lowrank.evaluate.held_out_answers import score_answers
from lowrank.pipelines.train import train
from lowrank.report.events import EvalDone, Event, Notice, StepDone
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca


class Ear:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def report(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass

    def losses(self, job: str) -> list[float]:
        return [event.loss for event in self.events if isinstance(event, StepDone) and event.job == job]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_checkpoint_folder(folder / "model")
    write_alpaca(folder / "train.json", 40)
    write_alpaca(folder / "eval.json", 8, start=100)
    return folder


def settings(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Two jobs of different length, with everything that has a state: dropout, noise, schedules, shuffling."""
    return {
        "model": {"path": str(world / "model"), "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(world / "train.json")], "eval": [str(world / "eval.json")], "batch_size": 8},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"type": "cosine", "warmup_steps": 2},
        "output_dir": str(out),
        "save_steps": 4,
        "eval_steps": 3,
        "num_train_epochs": 2,
        "jobs": [
            {"name": "a", "adapter": {"rank": 4, "dropout": 0.1}},
            {"name": "b", "adapter": {"rank": 8, "type": "rslora"}, "neftune_noise_alpha": 5.0, "max_steps": 6},
        ],
        **changes,
    }


def run(given: dict[str, Any]) -> tuple[dict[str, Any], Ear]:
    ear = Ear()
    return train(RunConfig(**given), reporters=[ear]), ear


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.relative_to(out)}/{name}": tensor
        for path in sorted(out.glob("?/*/adapter_model.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_learns_and_leaves_what_it_promises(world: Path, tmp_path: Path) -> None:
    summary, ear = run(settings(world, tmp_path / "run"))
    assert ear.losses("a")[-1] < ear.losses("a")[0] - 0.1  # a random frozen base can be taught no more in ten steps
    assert (len(ear.losses("a")), len(ear.losses("b"))) == (10, 6)
    assert [event.step for event in ear.events if isinstance(event, EvalDone) and event.job == "a"] == [3, 6, 9, 10]
    for name in ("summary.json", "config.json", "a/best", "a/last", "b/best", "b/last", "checkpoints"):
        assert (tmp_path / "run" / name).exists(), name
    assert json.loads((tmp_path / "run/summary.json").read_text()).keys() == summary.keys()


def test_peft_loads_the_adapter(world: Path, tmp_path: Path) -> None:
    _, ear = run(settings(world, tmp_path / "run"))
    base = transformers.AutoModelForCausalLM.from_pretrained(world / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "a" / "last").eval()
    losses, count = 0.0, 0
    for number in range(100, 108):
        messages = [{"role": "user", "content": f"Say {number}"}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        answer = f"{number} {number}<|im_end|>"
        token = tokenizer(prompt + answer, return_tensors="pt").input_ids
        length = len(tokenizer(answer).input_ids)
        with torch.no_grad():
            logprob = model(token).logits[0, :-1].log_softmax(-1).gather(1, token[0, 1:, None])[-length:, 0]
        losses, count = losses - logprob.sum().item(), count + length
    last = [event.loss for event in ear.events if isinstance(event, EvalDone) and event.job == "a"][-1]
    assert losses / count == pytest.approx(last, rel=1e-5)


class Stopper(Ear):
    """Presses Ctrl-C after step 5."""

    def report(self, event: Event) -> None:
        super().report(event)
        if isinstance(event, StepDone) and event.job == "a" and event.step == 5:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("error", ["row", "network"])
def test_a_stream_that_breaks_off_costs_no_step_that_was_taken(
    error: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that the settings refuse behind those that are looked at beforehand, or a file that cannot be read on."""
    monkeypatch.setattr("lowrank.data.prepare._ROWS_AHEAD", 2)
    monkeypatch.setattr("lowrank.data.batching.dataloader._WINDOW", 2)
    monkeypatch.setattr("lowrank.data.chat.rendering._ROWS_AT_ONCE", 2)
    rows = [json.dumps(row) for row in json.loads((world / "train.json").read_text(encoding="utf-8"))]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    source = {"path": str(tmp_path / "rows.jsonl"), "format": "alpaca"}
    data = {"train": [source], "streaming": True, "strict": True, "batch_size": 1}
    given = settings(world, tmp_path / "run", data=data, eval_steps=None, max_steps=20, save_steps=None)
    given["jobs"] = [{"name": "a", "adapter": {"rank": 4}}, {"name": "b", "adapter": {"rank": 8}, "seed": 3}]
    _, plain = run({**given, "output_dir": str(tmp_path / "plain")})

    ear = Ear()
    with monkeypatch.context() as patch:
        if error == "row":
            broken = [*rows[:16], json.dumps({"instruction": "Say", "output": 5}), *rows[17:]]
            (tmp_path / "rows.jsonl").write_text("\n".join(broken), encoding="utf-8")
        else:
            read_rows = dataset.read_rows

            def breaking(*args: Any, **named: Any) -> Iterator[Any]:
                for number, row in enumerate(read_rows(*args, **named)):
                    if number == 16:
                        raise ConnectionResetError("the hub is gone")
                    yield row

            patch.setattr(dataset, "read_rows", breaking)
        kind, text = (
            (DataError, "row 17.*step 1[0-9], written now") if error == "row" else (ConnectionResetError, "hub")
        )
        with pytest.raises(kind, match=re.compile(text, re.DOTALL)):
            train(RunConfig(**given), reporters=[ear])
    assert len(ear.losses("a")) > 8
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    _, rest = run({**given, "resume": True})
    for job in "ab":
        assert ear.losses(job) + rest.losses(job) == plain.losses(job)


def test_resume_is_bit_exact(world: Path, tmp_path: Path) -> None:
    """Stopped after step 5 (by a real Ctrl-C) and resumed: every loss and every weight as if nothing had happened."""
    _, whole = run(settings(world, tmp_path / "whole"))
    stopper = Stopper()
    given = settings(world, tmp_path / "cut")
    summary = train(RunConfig(**given), reporters=[stopper])
    assert summary["interrupted"]
    assert len(stopper.losses("a")) == 5
    _, rest = run({**given, "resume": True})
    assert stopper.losses("a") + rest.losses("a") == whole.losses("a")
    assert stopper.losses("b") + rest.losses("b") == whole.losses("b")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert len(one) == 4 * 28
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resumed_job_leaves_the_other_alone_and_longer_runs_go_on(world: Path, tmp_path: Path) -> None:
    given = settings(world, tmp_path / "run", schedule={"type": "constant"})
    run(given)
    given["num_train_epochs"] = 3
    _, ear = run({**given, "resume": True})
    assert (len(ear.losses("a")), len(ear.losses("b"))) == (5, 0)
    _, again = run({**given, "resume": True})
    assert not again.losses("a")


def test_another_length_moves_a_schedule_with_a_notice(world: Path, tmp_path: Path) -> None:
    """A cosine over 2 steps, whose rate was 0.5 of its peak, and is 0.25 as the third of 3; beside a constant one."""
    jobs = [{"name": "a"}, {"name": "b", "schedule": "constant"}]
    given = settings(world, tmp_path / "run", jobs=jobs, schedule="cosine", max_steps=2, eval_steps=None)
    run(given)
    _, rest = run({**given, "max_steps": 3, "resume": True})
    assert [event for event in rest.events if isinstance(event, Notice) and "spans" in event.text] == [
        Notice(
            "schedule: cosine now spans 3 steps instead of 2, so the learning rate goes from 5.0e-03 (step 2) to "
            "2.5e-03 (step 3), as it does not in a run of that length from the beginning; a constant schedule has no "
            "such jump",
            level="warning",
            job="a",
        )
    ]
    steps = [event for event in rest.events if isinstance(event, StepDone) and event.job == "a"]
    assert [event.learning_rate for event in steps] == [pytest.approx(2.5e-3)]


def test_a_job_past_its_new_end_is_not_trained_further(world: Path, tmp_path: Path) -> None:
    """Once: one step more, on a learning rate from beyond the schedule's end, and "6/3 done"."""
    given = settings(world, tmp_path / "run")
    train(RunConfig(**given), reporters=[Stopper()])
    kept = weights(tmp_path / "run")
    shorter = {**given, "max_steps": 3, "resume": True}
    with pytest.raises(OutputError, match=r"a: it has taken 5 steps, and now ends at step 3; set more than 5"):
        run(shorter)
    assert all(torch.equal(kept[name], own) for name, own in weights(tmp_path / "run").items())
    _, rest = run({**given, "resume": True})
    assert rest.losses("a")


def test_full_tuning_trains_the_base(world: Path, tmp_path: Path) -> None:
    given = settings(world, tmp_path / "full", tuning="full", optimizer={"learning_rate": 1e-3})
    del given["jobs"]
    _, ear = run({**given, "num_train_epochs": 4})
    assert ear.losses("default")[-1] < ear.losses("default")[0]
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "default" / "last")
    before = transformers.AutoModelForCausalLM.from_pretrained(world / "model")
    assert trained.state_dict().keys() == before.state_dict().keys()
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)


def test_a_folder_with_something_in_it_is_refused(world: Path, tmp_path: Path) -> None:
    given = settings(world, tmp_path / "run", max_steps=1)
    run(given)
    with pytest.raises(OutputError, match=r"resume=true(.|\n)*overwrite=true"):
        run(given)
    broken = {**given["data"], "train": [str(world / "no_such.json")]}
    with pytest.raises(DataError):
        run({**given, "overwrite": True, "data": broken})
    assert (tmp_path / "run" / "summary.json").exists()  # what is refused takes nothing away
    summary, _ = run({**given, "overwrite": True})
    assert not summary["interrupted"]
    with pytest.raises(OutputError, match="learning_rate"):
        run({**given, "resume": True, "optimizer": {"learning_rate": 5e-2}})


def test_jobs_with_the_same_data_share_what_was_read(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And learn what they would learn alone, since each walks over it by itself."""
    reads: list[str] = []
    monkeypatch.setattr(
        "lowrank.pipelines.job_data.prepare", lambda data, **how: reads.append("read") or prepare(data, **how)
    )
    given = settings(world, tmp_path / "run", max_steps=3)
    jobs = [{"name": "a"}, {"name": "b"}, {"name": "c", "seed": 7}, {"name": "d", "data": {"batch_size": 2}}]
    _, ear = run({**given, "jobs": [*jobs, {"name": "e", "data": {"default_system": "Be brief."}}]})
    assert len(reads) == 2, "once for all but the one that reads rows otherwise"
    assert ear.losses("a") == ear.losses("b") != ear.losses("c")
    assert ear.losses("a") != ear.losses("d")


DATED = "{%- if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}\n{%- endif %}"


def test_a_run_goes_on_with_the_date_it_began_on(world: Path, tmp_path: Path) -> None:
    template = transformers.AutoTokenizer.from_pretrained(world / "model").chat_template
    (tmp_path / "dated.jinja").write_text(DATED + template)
    given = settings(world, tmp_path / "run")
    given["data"] |= {"chat_template": str(tmp_path / "dated.jinja"), "chat_template_date": "2024-07-26"}
    run({**given, "max_steps": 2})
    del given["data"]["chat_template_date"]
    run({**given, "max_steps": 4, "resume": True})  # today's would change the data, which is refused
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["jobs"][0]["data"]["chat_template_date"] == "2024-07-26"
    run({**given, "max_steps": 1, "overwrite": True})
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["jobs"][0]["data"]["chat_template_date"] == str(date.today())


def test_what_concerns_several_jobs_is_said_once_and_choices_are_no_warnings(world: Path, tmp_path: Path) -> None:
    given = settings(world, tmp_path / "run", max_steps=1)
    given["data"] |= {"max_samples": 30, "max_length": 30, "on_too_long": "drop", "eval": []}
    jobs = [{"name": "a"}, {"name": "b"}, {"name": "c", "seed": 7}]
    _, ear = run({**given, "jobs": jobs, "eval_steps": None})
    notices = [(event.level, event.job, event.text) for event in ear.events if isinstance(event, Notice)]
    chosen = [(level, job, text) for level, job, text in notices if "rows are taken" in text]
    assert {(level, job, text.partition(": ")[0]) for level, job, text in chosen} == {
        ("info", None, "a, b"),
        ("info", "c", str(world / "train.json")),
    }
    lost = [level for level, _, text in notices if "left out" in text]
    assert lost
    assert set(lost) == {"warning"}
    assert len(notices) == len(set(notices))


def test_data_is_checked_before_the_model_loads(world: Path, tmp_path: Path) -> None:
    """The model has no weights at all, and still the error is the data's."""
    save_checkpoint_folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "bad.json").write_text('[{"instruction": "x", "output": "y"},]', encoding="utf-8")
    given = settings(world, tmp_path / "run", model={"path": str(tmp_path / "model")})
    given["data"]["train"] = [str(tmp_path / "bad.json")]
    with pytest.raises(DataError, match=r"bad\.json"):
        run(given)
    run(settings(world, tmp_path / "run", max_steps=1))  # nothing was left that refuses the mended run


def test_generated_answers_decide_and_disturb_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`a` keeps what answers best, `b` its lowest loss; every loss and weight as if nobody had generated."""
    judged = {"eval_metric": "rougeL", "eval_generate_samples": 4, "eval_max_new_tokens": 6}
    plain = settings(world, tmp_path / "plain")
    given = {
        **plain,
        "output_dir": str(tmp_path / "judged"),
        "jobs": [{**plain["jobs"][0], **judged}, plain["jobs"][1]],
    }
    _, whole = run(plain)
    draws = 0

    def watched(*arguments: Any) -> Any:
        nonlocal draws
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
        found = score_answers(*arguments)
        draws += not torch.equal(before[0], torch.get_rng_state())
        draws += before[1:] != (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
        return found

    monkeypatch.setattr("lowrank.train.loop.score_answers", watched)
    summary, ear = run(given)
    assert draws == 0
    assert [ear.losses(name) for name in "ab"] == [whole.losses(name) for name in "ab"]
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "judged")
    assert all(torch.equal(one[name], other[name]) for name in one if "/best/" not in name)
    evaluated = [event for event in ear.events if isinstance(event, EvalDone) and event.job == "a"]
    scores = [(event.metrics["rougeL"], -event.loss, event.step) for event in evaluated]
    assert {event.metric for event in evaluated} == {"rougeL"}
    best = summary["jobs"]["a"]["best_eval"]
    assert (best["score"], -best["loss"], best["step"]) == max(scores)
    assert best["metric"] == "rougeL"
    assert "score" not in summary["jobs"]["b"]["best_eval"]
    assert any("rougeL is of 4 of 8 held-out answers" in e.text for e in ear.events if isinstance(e, Notice))
    lines = [json.loads(line) for line in (tmp_path / "judged" / "metrics.jsonl").read_text().splitlines()]
    assert [line["metrics"]["rougeL"] for line in lines if line["event"] == "eval" and line["job"] == "a"] == [
        score for score, _, _ in scores
    ]
    cut = {**given, "output_dir": str(tmp_path / "cut")}
    stopper = Stopper()
    assert train(RunConfig(**cut), reporters=[stopper])["interrupted"]
    resumed, rest = run({**cut, "resume": True})
    assert stopper.losses("a") + rest.losses("a") == whole.losses("a")
    assert resumed["jobs"]["a"]["best_eval"] == best
    again = weights(tmp_path / "cut")
    assert all(torch.equal(other[name], again[name]) for name in other)


@pytest.mark.parametrize(
    ("changes", "described"),
    [
        ({"data": {"train": ["x.json"]}}, "eval_metric: there are no held-out rows"),
        ({"objective": "reward"}, "eval_metric: objective reward learns no answers"),
        ({"objective": "pretrain"}, "eval_metric: objective pretrain learns no answers"),
    ],
)
def test_a_metric_that_cannot_be_had_is_refused(
    world: Path, tmp_path: Path, changes: dict[str, Any], described: str
) -> None:
    given = {**settings(world, tmp_path), "eval_metric": "exact_match", **changes}
    with pytest.raises(ConfigError, match=described):
        validate_settings(given)

"""Objectives, reward functions, formats and classes of one's own, handed to `lowrank.train` and to a resumed run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import lowrank
from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.variants.base import Variant
from lowrank.adapters.variants.dora import DoraConfig
from lowrank.adapters.variants.lora import Lora, LoraConfig
from lowrank.api.settings import plain_settings
from lowrank.api.training import _listeners
from lowrank.config import validate_settings
from lowrank.models.storages import BaseLinear
from lowrank.objectives.pretrain import PretrainConfig
from lowrank.objectives.rollout import call_reward_function
from lowrank.records import Conversation, Message
from lowrank.report.events import RunFinished, StepDone
from lowrank.report.reporters.log import LogReporter
from lowrank.report.reporters.trackers import connect_trackers
from lowrank.settings import Settings
from lowrank.third_party import objects_given
from lowrank.train.optimizers import OptimizerSettings
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.api.quick_run import QUICK, ROWS, settings


def test_resume_keeps_an_objective_of_ones_own(tmp_path: Path) -> None:
    own: list[Any] = [Plain(2.0), Focal, Focal.Config()]
    for number, objective in enumerate(own):
        jobs = [{"name": "top"}, {"name": "own", "objective": objective}]
        own_settings = settings(jobs=jobs, objective=objective, schedule="constant", output_dir=tmp_path / f"{number}")
        longer = lowrank.train(**own_settings).resume(max_steps=5)
        written = json.loads((longer.path / "config.json").read_text())
        assert {job["objective"]["type"].partition(":")[0] for job in written["jobs"]} == {"tests.api.test_own_code"}
        assert longer.summary["jobs"]["top"]["steps"] == 5


IN_A_NEW_PROCESS = """
import sys
import lowrank

class Mean:  # without `Config`: the object itself is handed over
    record = lowrank.Conversation

    def __init__(self, scale=1.0):
        self.scale = scale

    def count(self, batch):
        return {"tokens": float(batch.weight_T.sum())}

    def loss(self, scores, batch, totals):
        return -self.scale * (batch.weight_T * scores.logprob_T).sum() / max(totals["tokens"], 1e-9), {}

def turned(row, columns, tags) -> lowrank.Conversation:
    return lowrank.Conversation((lowrank.Message("user", row["q"]), lowrank.Message("assistant", row["a"])))

rows = [{"q": f"Say {n}.", "a": f"It is {n}."} for n in range(8)]
top, steps = sys.argv[1:]
if steps == "train":
    lowrank.train(
        model={"path": "lowrank/tiny", "dtype": "float32"}, adapter={"target_modules": ["q_proj"]}, schedule="constant",
        jobs=[{"name": "plain"}, {"name": "own", "objective": Mean(2.0)}],
        data={"train": {"rows": rows, "format": turned}, "batch_size": 4}, output_dir=top, max_steps=2,
    )
    sys.exit()
run = lowrank.TrainedRun(top)
own = [Mean(2.0), turned]
for wrong in ({}, {"allow_code": True}, {"objects": [print]}, {"objects": own}, {"objects": [*own, rows[:3]]}):
    try:
        run.resume(max_steps=3, **wrong)
    except lowrank.LowrankError as error:
        print(error)
heard = []
longer = run.resume(objects=[Mean(2.0), turned, rows], reporters=[heard.append], max_steps=3)
longer = longer.resume(max_steps=4)
print(sum(isinstance(each, lowrank.StepDone) for each in heard), longer.metrics().step.max(), longer.interrupted)
"""


@pytest.mark.slow  # two processes, half a minute; tests/api/test_objects.py has the names
def test_resume_in_a_new_process_takes_the_objects(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(IN_A_NEW_PROCESS)

    def process(steps: str) -> str:
        command = [sys.executable, str(file), str(tmp_path / "run"), steps]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    process("train")
    printed = process("resume")
    for part in (
        "lowrank.TrainedRun(RUN).resume(objects=[...])",
        "has no attribute `Config`",
        "builtins:print is none of the objects that the run was given; known: __main__:Mean, __main__:turned",
        "lowrank.TrainedRun(RUN).resume(objects=[rows])",
        "these rows are not those that the run was given",
    ):
        assert part in printed, printed
    assert "jobs.1.objective.type: '__main__:Mean'" in printed
    assert printed.splitlines()[-1] == "2 4 False"


class _FocalSettings(Settings):
    type: Literal["tests.api.test_own_code:Focal"] = "tests.api.test_own_code:Focal"
    gamma: float = 2.0

    def build(self) -> Focal:
        return Focal(self.gamma)


class Focal:
    """An objective as docs/add-an-objective.md has it."""

    Config = _FocalSettings
    record = Conversation

    def __init__(self, gamma: float = 2.0) -> None:
        self.gamma = gamma

    def count(self, batch: Any) -> dict[str, float]:
        return {"tokens": float(batch.weight_T.sum())}

    def loss(self, scores: Any, batch: Any, totals: Any) -> tuple[torch.Tensor, dict[str, float]]:
        known_T = scores.logprob_T.exp()
        loss_T = -batch.weight_T * (1 - known_T) ** self.gamma * scores.logprob_T
        return loss_T.sum() / max(totals["tokens"], 1e-9), {}


class Plain(Focal):
    """One without settings: the object itself is handed over."""

    Config = None  # type: ignore[assignment]


def losses(tmp_path: Path, name: str, **own: Any) -> list[float]:
    return list(lowrank.train(**settings(output_dir=tmp_path / name, **own)).metrics().loss)


def test_an_objective_as_class_as_settings_and_as_object(tmp_path: Path) -> None:
    by_class = losses(tmp_path, "class", objective=Focal)
    assert by_class == losses(tmp_path, "settings", objective=Focal.Config(gamma=2.0))
    assert by_class == losses(tmp_path, "group", objective={"type": Focal, "gamma": 2.0})
    assert by_class == losses(tmp_path, "settings-class", objective=Focal.Config)
    assert by_class == losses(tmp_path, "object", objective=Plain(2.0))
    assert by_class != losses(tmp_path, "other", objective=Plain(0.5))
    written = json.loads((tmp_path / "class/config.json").read_text())
    assert written["jobs"][0]["objective"]["type"] == "tests.api.test_own_code:Focal"
    with pytest.raises(lowrank.ConfigError, match="--allow-code"):  # what a file says later is as closed as ever
        validate_settings(
            {**QUICK, "data": "lowrank/demo", "output_dir": "x", "objective": "tests.api.test_own_code:Focal"}
        )
    with pytest.raises(lowrank.ConfigError, match=r"objective: .* cannot be used"):
        lowrank.train(**settings(output_dir=tmp_path / "none", objective=3))


class Scaled(Lora):
    """A variant as docs/add-a-variant.md has it."""

    class Config(AdapterSettings):
        type: Literal["tests.api.test_own_code:Scaled"] = "tests.api.test_own_code:Scaled"

        def build(self) -> Scaled:
            return Scaled()

        def as_saved(self) -> AdapterSettings:
            return LoraConfig(**self.shared())


class Formless(Lora):
    """A variant that says nothing about its files."""

    class Config(AdapterSettings):
        type: Literal["tests.api.test_own_code:Formless"] = "tests.api.test_own_code:Formless"

        def build(self) -> Formless:
            return Formless()


class Gated(Lora):
    """A variant that trains a tensor which LoRA, as which it would be saved, does not have."""

    class Config(Scaled.Config):
        type: Literal["tests.api.test_own_code:Gated"] = "tests.api.test_own_code:Gated"  # type: ignore[assignment]

        def build(self) -> Gated:  # type: ignore[override]
            return Gated()

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {**super().init(base, rank, scale, generator), "gate": torch.ones(1)}


def test_a_variant_that_no_file_has_a_place_for_is_refused_before_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the first save, when all it has learned is lost."""
    monkeypatch.setattr("lowrank.models.loading.pretrained.load", lambda *_, **__: pytest.fail("the model is loaded"))
    jobs = [{"name": "first"}, {"name": "second", "adapter": Formless}, {"name": "third", "data": {"train": []}}]
    with pytest.raises(lowrank.ConfigError) as caught:
        lowrank.train(**settings(output_dir=tmp_path / "run", jobs=jobs))
    second, third = caught.value.problems
    assert second.startswith("jobs.1.adapter.type: 'tests.api.test_own_code:Formless' has no form in PEFT's layout")
    assert all(name in second for name in ("`as_saved`", "`peft_fields`"))
    assert third.startswith("jobs.2.data.train")
    assert not (tmp_path / "run").exists()


def test_tensors_that_no_file_has_a_place_for_are_refused_before_the_first_step(tmp_path: Path) -> None:
    received: list[Any] = []
    with pytest.raises(lowrank.ModelError, match=r"gate: LoraConfig\.peft \(LORA\) declares no such tensor"):
        lowrank.train(**settings(output_dir=tmp_path / "run", adapter=Gated), reporters=[received.append])
    assert not any(isinstance(each, StepDone) for each in received)


@pytest.mark.parametrize(
    ("given", "type_name"),
    [
        ({"adapter": DoraConfig}, "dora"),
        ({"adapter": {"type": DoraConfig, "rank": 4}}, "dora"),
        ({"adapter": Scaled}, "tests.api.test_own_code:Scaled"),
        ({"adapter": Scaled.Config}, "tests.api.test_own_code:Scaled"),
        ({"adapter": Scaled.Config(rank=4)}, "tests.api.test_own_code:Scaled"),
        ({"objective": PretrainConfig}, "pretrain"),
        ({"optimizer": AdamWConfig}, "adamw"),
    ],
)
def test_classes_and_settings_classes_stand_for_their_type(given: dict[str, Any], type_name: str) -> None:
    plain = plain_settings(given)
    with objects_given(plain.objects):
        config = validate_settings({**QUICK, "data": "lowrank/demo", "output_dir": "x", **plain.values})
    group = next(iter(given))
    assert getattr(config.jobs[0], group).type == type_name


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run folders of these tests have relative names."""
    monkeypatch.chdir(tmp_path)


def problems_of(**given: Any) -> list[str]:
    """Return what is refused of these settings, before a model is located: the one named here is nowhere."""
    with pytest.raises(lowrank.LowrankError) as caught:
        lowrank.train(**{"model": "nowhere", "data": ROWS, "output_dir": "never", **given})
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()]


def of(thing: type, *left_out: str, **others: Any) -> Any:
    """Return `thing` without some members, and with others."""
    members = {name: value for name, value in vars(thing).items() if name not in left_out}
    return type("Own", (), members | others)


def test_an_objective_that_lacks_a_member_is_refused_with_the_settings() -> None:
    kinds = "the class of record that it learns from: Conversation, Text, Preference, Rated, Prompted"
    page = "docs/add-an-objective.md"
    heading, *found = problems_of(
        jobs=[
            {"name": "a", "objective": of(Focal, "record", "Config")()},
            {"name": "b", "objective": of(Focal, "count", "Config")(), "data": {"train": ROWS, "streaming": True}},
            {"name": "c", "objective": of(Focal, "Config", record=str, needs=("refrence",))},
            {"name": "d", "objective": of(Focal, "Config", needs=("observed",), count=lambda self: {})()},
            {"name": "e", "objective": of(Focal, "Config", __init__=lambda self, gamma: None)},
        ]
    )
    assert heading == "the settings of lowrank.train cannot be used:"
    built = found.pop(6)
    assert built.startswith("jobs.4.objective: tests.api.test_own_code:Own_5 cannot be built: TypeError: ")
    assert "missing 1 required positional argument: 'gamma'" in built
    assert found == [
        f"jobs.0.objective: Own has no `record`, {kinds}: {page}",
        f"jobs.1.objective: Own has no method `count(batch)`: {page}",
        f"jobs.2.objective: Own.record is <class 'str'>; expected {kinds}: {page}",
        f"jobs.2.objective: Own.needs has 'refrence'; did you mean 'reference'?: {page}",
        f"jobs.3.objective: Own.count takes (), and is called with (batch): {page}",
        f"jobs.3.objective: Own has no method `observe(scores, batch)`: {page}",
        "jobs.1.max_steps: needed with data.streaming, since the number of rows is not known beforehand",
    ]


def test_what_cannot_receive_events_is_refused_before_anything_is_read() -> None:
    class Hooks:
        def on_step_end(self, *arguments: Any) -> None:
            raise AssertionError("never called")

        def __repr__(self) -> str:
            return "Hooks()"

    class Report(Hooks):
        def report(self) -> None:
            raise AssertionError("never called")

    def nothing() -> None:
        raise AssertionError("never called")

    without = "has no method `report(event)` and is no function that could be called with events"
    refused = [
        "train: these reporters cannot be used (docs/add-a-reporter.md):",
        f"reporters.0: Hooks() {without}",
        "reporters.1: Report.report takes (), and is called with (event)",
        "reporters.2: Report is a class; give an object of it, Report(...)",
        f"reporters.3: {nothing.__qualname__} takes (), and is called with (event)",
        f"reporters.4: 'wandb' {without}; a tracker is named by report_to",
    ]
    given: Any = [Hooks(), Report(), Report, nothing, "wandb", print, [].append]
    assert problems_of(reporters=given) == refused
    assert problems_of(reporters=Hooks())[1:] == [f"reporters: Hooks() {without}"]
    assert problems_of(reporters=None)[1:] == [f"reporters: None {without}"]
    run = lowrank.TrainedRun("never", config=Any)  # type: ignore[arg-type]
    with pytest.raises(lowrank.ConfigError, match=r"reporters\.0: Hooks\(\) has no method"):
        run.resume(reporters=[Hooks()])  # type: ignore[list-item]


def test_a_single_function_is_a_list_of_one_reporter() -> None:
    received: list[Any] = []
    view, alone = _listeners(received.append, None)
    alone.report("event")  # type: ignore[arg-type]
    assert (type(view), received) == (LogReporter, ["event"])
    assert _listeners(view, False) == [view]


def test_a_reporter_of_ones_own_in_a_file_is_checked(tmp_path: Path) -> None:
    with objects_given({"own:Hooks": lambda folder: [folder]}), pytest.raises(lowrank.ConfigError) as caught:
        connect_trackers(tmp_path, ["own:Hooks"])
    assert caught.value.problems == (
        "own:Hooks gives a list, which has no method `report(event)`: docs/add-a-reporter.md",
    )


def test_what_is_none_of_a_kind_is_answered_with_the_page_of_that_kind() -> None:
    def function(scores: Any) -> None:
        raise AssertionError("never called")

    for group, page in (
        ("objective", "add-an-objective"), ("adapter", "add-a-variant"), ("optimizer", "add-an-optimizer"),
    ):  # fmt: skip
        (text,) = problems_of(**{group: function})
        assert text.startswith(f"{group}: <function test_what")
        assert text.endswith(f"or a name: docs/{page}.md")
    assert "; give an object with `record`, `count` and `loss`, a class with" in problems_of(objective=function)[0]
    wrong = problems_of(adapter=Focal, optimizer=Scaled)[1:]
    assert wrong == [
        "adapter: tests.api.test_own_code:Focal.Config is <class 'tests.api.test_own_code._FocalSettings'>; expected a "
        "subclass of lowrank.adapters.config.AdapterSettings: docs/add-a-variant.md",
        "optimizer: tests.api.test_own_code:Scaled.Config is <class 'tests.api.test_own_code.Scaled.Config'>; expected "
        "a subclass of lowrank.train.optimizers.OptimizerSettings: docs/add-an-optimizer.md",
    ]


class Idle:
    """An optimizer and a variant that do nothing."""

    class Config(OptimizerSettings):
        type: Literal["tests.api.test_own_code:Idle"] = "tests.api.test_own_code:Idle"


class Empty(Variant):
    class Config(AdapterSettings):
        type: Literal["tests.api.test_own_code:Empty"] = "tests.api.test_own_code:Empty"

        def build(self) -> Empty:
            return Empty()


def test_variants_and_optimizers_that_say_nothing_are_refused_with_the_settings() -> None:
    assert problems_of(adapter=Empty, optimizer=Idle, objective=Scaled)[1:7] == [
        "objective: Scaled has no `record`, the class of record that it learns from: Conversation, Text, Preference, "
        "Rated, Prompted: docs/add-an-objective.md",
        "objective: Scaled has no method `count(batch)`: docs/add-an-objective.md",
        "objective: Scaled has no method `loss(scores, batch, totals)`: docs/add-an-objective.md",
        "adapter: Empty has no method `init(base, rank, scale, generator)`, which returns fresh tensors: "
        "docs/add-a-variant.md",
        "adapter: Empty has neither `as_low_rank(tensors)` nor both of `apply` and `merge`, so nothing says what it "
        "does: docs/add-a-variant.md",
        "optimizer: Idle.Config has no method `make(groups)`, which returns the optimizer: docs/add-an-optimizer.md",
    ]


def test_reward_functions_are_checked_before_the_model_loads() -> None:
    async def slow(completions: list[Any]) -> list[float]:
        return []

    def by_place(completions: list[Any], /) -> list[float]:
        return []

    def graded(completions: list[Any], rubric: list[str], label: Any, at: int = 0) -> list[float]:
        return []

    grpo = {"type": "grpo", "num_generations": 2}
    for function, text in (
        (slow, "is `async def`, whose calls give no rewards; make it a plain function"),
        (by_place, "takes (completions, /) by position, and reward functions are called by keyword"),
        (7, "expected a text, got 7"),
    ):
        assert problems_of(objective={**grpo, "reward_funcs": [function]})[1].endswith(text)
    rows = [{"prompt": f"Say {n}.", "topic": "numbers"} for n in range(4)]
    given = {"model": "lowrank/tiny", "data": rows}
    assert problems_of(**given, objective={**grpo, "reward_funcs": [graded]})[1:] == [
        f"objective.reward_funcs: {__name__}:test_reward_functions_are_checked_before_the_model_loads_graded "
        "requires rubric; it is called with prompts, completions, completion_ids, label and the columns of the data "
        "(prompt, topic). Give the rows such a column, or the parameter a default"
    ]


def test_a_reward_function_that_fails_is_told_each_argument_once() -> None:
    given = {"label": [None], "topic": ["x"], "prompts": [[]], "completions": [[]], "completion_ids": [[]]}
    for function in (lambda completions: 1 / 0, max):
        with objects_given({"own:fn": function}), pytest.raises(lowrank.ConfigError) as caught:
            call_reward_function("own:fn", 1, given)
        assert str(caught.value).splitlines()[-1] == (
            "  it is called with prompts, completions, completion_ids, label and the columns of the data (topic), and "
            "must return a list of numbers"
        )


def test_functions_for_rows_and_formats_are_checked_by_their_signature() -> None:
    def of_a_file(path: str) -> Any:
        raise AssertionError("never called")

    def short(row: Any) -> Conversation:
        raise AssertionError("never called")

    def nameless(row: Any, columns: Any, tags: Any) -> Conversatoin:  # type: ignore[name-defined]  # noqa: F821
        raise AssertionError("never called")

    (text,) = problems_of(data=of_a_file)
    assert text.endswith("of_a_file takes (path), and is called with ()")
    for function, problem in (
        (short, "short takes (row), and is called with (row, columns, tags): docs/add-a-format.md"),
        (nameless, "format nameless: its annotations cannot be read: NameError: name 'Conversatoin' is not defined"),
    ):
        text = problems_of(model="lowrank/tiny", data={"train": {"rows": ROWS, "format": function}})[1]
        assert text.endswith(problem), text


def test_a_settings_class_of_another_group_is_refused() -> None:
    with pytest.raises(lowrank.ConfigError, match=r"objective: DoraConfig needs a field `type: Literal\['my_module"):
        plain_settings({"objective": DoraConfig})


def test_an_objective_that_gives_something_else_is_told_what_is_expected(tmp_path: Path) -> None:
    class Bare(Plain):
        def loss(self, scores: Any, batch: Any, totals: Any) -> Any:
            return super().loss(scores, batch, totals)[0]

    class Whole(Plain):
        def loss(self, scores: Any, batch: Any, totals: Any) -> Any:
            return scores.logprob_T, {}

    class Counts(Plain):
        def count(self, batch: Any) -> Any:
            return {"tokens": batch.weight_T.sum()}

    for kind, message in (
        (Bare, r"objective Bare: `loss` gave a tensor of shape \(\); expected a tuple"),
        (Whole, r"objective Whole: `loss` gave a tuple of a tensor of shape \(\d+,\), a dict of nothing; expected"),
        (
            Counts,
            r"objective Counts: `count` gave a dict of 'tokens': a tensor of shape \(\); expected a dict of numbers",
        ),
    ):
        with pytest.raises(lowrank.ConfigError, match=message):
            lowrank.train(**settings(output_dir=tmp_path / kind.__name__, objective=kind()))


def test_reward_functions_formats_and_callbacks_are_just_handed_over(tmp_path: Path) -> None:
    received: list[Any] = []
    judged: list[str] = []

    def short(completions: list[Any], **columns: Any) -> list[float]:
        judged.extend(each[0]["content"] for each in completions)
        return [-float(len(each[0]["content"])) for each in completions]

    objective = {"type": "grpo", "num_generations": 2, "max_completion_length": 4,
                 "reward_funcs": [short, lambda completions, **columns: [0.0] * len(completions)]}  # fmt: skip
    lowrank.train(
        **{**QUICK, "max_steps": 1}, data={"train": ROWS, "batch_size": 2}, objective=objective,
        output_dir=tmp_path / "grpo", reporters=[received.append],
    )  # fmt: skip
    assert len(judged) == 4
    assert isinstance(received[-1], RunFinished)
    assert sum(isinstance(each, StepDone) for each in received) == 1

    def upside_down(row: Any, columns: Any, tags: Any) -> Conversation:
        return Conversation((Message("user", row["a"]), Message("assistant", row["q"])))

    rows = [{"q": f"question {n}", "a": f"answer {n}"} for n in range(8)]
    data = {"train": {"rows": rows, "format": upside_down}, "batch_size": 4}
    assert lowrank.train(**settings(output_dir=tmp_path / "format", data=data)).jobs == ["default"]

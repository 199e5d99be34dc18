"""`import lowrank`: cheap, complete, typed; and everything from rows in memory to an export, without knowing a room."""

from __future__ import annotations

import inspect
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast, get_args

import datasets
import pandas
import pytest
import torch

import lowrank
from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.variants.dora import DoraConfig
from lowrank.adapters.variants.lora import Lora
from lowrank.api.settings import plain_settings
from lowrank.config import validate_settings
from lowrank.data.config import SourceConfig
from lowrank.data.sources.memory import keep_rows
from lowrank.data.sources.rows import read_rows
from lowrank.evaluate.questions import read_questions
from lowrank.export.targets import merged
from lowrank.objectives.pretrain import PretrainConfig
from lowrank.records import Conversation, Message
from lowrank.report.events import RunFinished, StepDone
from lowrank.settings import Settings
from lowrank.third_party import objects_given
from lowrank.train.optimizers.adamw import AdamWConfig

ROWS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(24)
]
QUICK: dict[str, Any] = {
    "model": {"path": "lowrank/tiny", "dtype": "float32"},
    "adapter": {"target_modules": ["q_proj"]},
    "max_steps": 3,
    "logging_steps": 1,
    "seed": 7,
}


def settings(**own: Any) -> dict[str, Any]:
    return {**QUICK, "data": {"train": ROWS, "batch_size": 4}, **own}


def test_importing_it_takes_nothing_heavy_along() -> None:
    heavy = ("torch", "transformers", "pydantic", "datasets", "numpy", "pandas", "IPython")
    script = f"import lowrank, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


def test_everything_offered_is_there_and_documented() -> None:
    for name in lowrank.__all__:
        thing = lowrank._verb(f"lowrank.{name}") if name in lowrank._VERBS else getattr(lowrank, name)
        assert name in ("__version__", "Event") or inspect.getdoc(thing), name
    assert set(lowrank.__all__) == {"__version__", *lowrank._VERBS, *lowrank._NAMES}
    assert set(lowrank.__all__) <= set(dir(lowrank))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        lowrank.trian  # type: ignore[attr-defined]  # noqa: B018


def test_what_type_checkers_see_is_what_there_is() -> None:
    text = Path(str(lowrank.__file__)).read_text(encoding="utf-8")
    seen = {line.rpartition(" as ")[2] for line in text.splitlines() if line.startswith("    from lowrank.")}
    assert seen | {"__version__"} == set(lowrank.__all__)


def test_a_verb_stays_callable_beside_the_package_of_its_name() -> None:
    import lowrank.train.engine as engine

    assert lowrank.train.engine is engine  # type: ignore[attr-defined]
    assert callable(lowrank.train)
    assert "progress" in inspect.signature(lowrank.train).parameters
    assert callable(lowrank.export)
    assert callable(lowrank.serve)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> lowrank.TrainedRun:
    jobs = [{"name": "r4", "adapter": {"rank": 4}}, {"name": "r8", "adapter": {"rank": 8}}]
    data = {"train": ROWS, "eval": ROWS[:4], "batch_size": 4}
    return lowrank.train(**settings(jobs=jobs, data=data, output_dir=tmp_path_factory.mktemp("run") / "run"))


def test_two_jobs_from_rows_in_memory(run: lowrank.TrainedRun) -> None:
    assert run.jobs == ["r4", "r8"]
    assert not run.interrupted
    metrics = run.metrics()
    steps = metrics[metrics.event == "step"]
    assert list(steps[steps.job == "r8"].step) == [1, 2, 3]
    assert steps.loss.notna().all()
    assert (metrics.event == "eval").any()
    again = lowrank.TrainedRun(run.path)
    pandas.testing.assert_frame_equal(again.metrics(), metrics)
    assert again.summary["jobs"].keys() == {"r4", "r8"}


def test_rows_give_the_bits_that_a_file_gives(run: lowrank.TrainedRun, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    jobs = [{"name": "r4", "adapter": {"rank": 4}}, {"name": "r8", "adapter": {"rank": 8}}]
    data = {"train": str(file), "eval": ROWS[:4], "batch_size": 4}
    other = lowrank.train(**settings(jobs=jobs, data=data, output_dir=tmp_path / "run"))
    assert list(other.metrics().loss) == list(run.metrics().loss)


def test_a_model_answers_alone_and_side_by_side(run: lowrank.TrainedRun) -> None:
    model = lowrank.load(run.path)
    assert model.adapters == ["r4", "r8"]
    one = model.generate("Say 3.", "r8", max_new_tokens=6)
    assert isinstance(one, str)
    messages = [{"role": "user", "content": "Say 3."}]
    assert model.generate([messages, "Say 3."], "r8", max_new_tokens=6) == [one, one]
    assert model.generate(messages, "r8", max_new_tokens=6) == one
    received: list[str] = []
    assert model.generate("Say 3.", "r8", max_new_tokens=6, on_text=received.append) == one == "".join(received)
    assert model.compare("Say 3.", max_new_tokens=6)["r8"] == one
    assert lowrank.generate(model, "Say 3.", "r8", max_new_tokens=6) == one
    with pytest.raises(lowrank.ModelError, match="2 adapters; say which"):
        model.generate("Say 3.")
    with pytest.raises(lowrank.ModelError, match="no adapter 'r9'"):
        model.generate("Say 3.", "r9")
    with pytest.raises(lowrank.ConfigError, match="max_token"):
        model.generate("Say 3.", "r8", max_token=6)
    with pytest.raises(lowrank.DataError, match="question 1: wrong role order"):
        model.generate([*messages, {"role": "assistant", "content": "3"}], "r8")


def test_evaluate_gives_a_frame(run: lowrank.TrainedRun) -> None:
    frame = lowrank.evaluate(run.path, ROWS[:4], max_new_tokens=4)
    assert set(frame.index) == {
        (name, metric) for name in ("base", "r4", "r8") for metric in ("exact_match", "perplexity")
    }
    assert frame.loc[("r8", "perplexity"), "value"] < frame.loc[("base", "perplexity"), "value"]
    assert frame.loc[("r8", "perplexity"), "gain"] < 0


def test_resume_goes_on_with_the_same_rows_only(tmp_path: Path) -> None:
    first = lowrank.train(**settings(output_dir=tmp_path / "run", schedule="constant"))
    longer = first.resume(max_steps=5)
    straight = lowrank.train(**settings(output_dir=tmp_path / "straight", max_steps=5, schedule="constant"))
    assert list(longer.metrics().loss) == list(straight.metrics().loss)
    other = settings(
        output_dir=tmp_path / "run", resume=True, schedule="constant", data={"train": ROWS[1:], "batch_size": 4}
    )
    with pytest.raises(lowrank.OutputError, match=r"data.train.*memory:"):
        lowrank.train(**other)


def test_resume_keeps_an_objective_of_ones_own(tmp_path: Path) -> None:
    own: list[Any] = [Plain(2.0), Focal, Focal.Config()]
    for number, objective in enumerate(own):
        jobs = [{"name": "top"}, {"name": "own", "objective": objective}]
        own_settings = settings(jobs=jobs, objective=objective, schedule="constant", output_dir=tmp_path / f"{number}")
        longer = lowrank.train(**own_settings).resume(max_steps=5)
        written = json.loads((longer.path / "config.json").read_text())
        assert {job["objective"]["type"].partition(":")[0] for job in written["jobs"]} == {"tests.api.test_front_door"}
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


def test_a_merged_model_says_what_the_adapter_says(run: lowrank.TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(lowrank.ConfigError, match="combine cannot be used"):
        run.export("merged", tmp_path / "merged", combine={"method": "best"})
    with pytest.raises(lowrank.DataError, match="row"):
        run.export("merged", tmp_path / "merged", prompts=[3])
    with pytest.raises(lowrank.ConfigError, match="max_samples"):
        run.export("merged", tmp_path / "merged", prompts={"rows": ROWS[:2], "max_samples": "few"})
    result = run.export("merged", tmp_path / "merged", adapters="r8", dtype="float32", prompts=ROWS[:4])
    assert result["passed"]
    assert result["targets"]["merged"]["compared_on"].startswith("4 rows of the rows given as prompts")
    loaded = lowrank.load(tmp_path / "merged")
    assert loaded.adapters == []
    assert loaded.generate("Say 3.", max_new_tokens=6) == run.load().generate("Say 3.", "r8", max_new_tokens=6)
    with pytest.raises(lowrank.ConfigError, match="dtpye"):
        run.export("merged", tmp_path / "other", dtpye="float32")


def test_a_merged_model_that_differs_says_by_what_and_the_way_out(
    run: lowrank.TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = {
        dtype: replace(allowed, mean_kl=0.0, top1_agreement=1.0, perplexity=0.0)
        for dtype, allowed in merged.TOLERANCES.items()
    }
    monkeypatch.setattr(merged, "TOLERANCES", strict)
    with pytest.raises(lowrank.NotTheSameError, match=r"merged: .* is expected; merged: write it with dtype=float32"):
        run.export("merged", tmp_path / "merged", adapters="r8", dtype="bfloat16", prompts=ROWS[:2])
    assert (tmp_path / "merged/export.json").is_file()


def refused(call: Callable[[], Any]) -> list[str]:
    with pytest.raises(lowrank.ConfigError) as caught:
        call()
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]


def test_settings_given_to_calls_are_refused_as_those_of_files(run: lowrank.TrainedRun) -> None:
    model = lowrank.Model(cast(Any, SimpleNamespace(names=["base"], slot=lambda name: -1)))
    assert refused(lambda: model.generate("Say 3.", max_tokens=4, top_p=3)) == [
        "top_p: expected a number at most 1, got 3",
        "max_tokens: unknown key; did you mean 'max_new_tokens'?",
    ]
    (unknown,) = refused(lambda: run.export("mergd"))
    assert unknown == "there is no type 'mergd'; did you mean 'merged'?"
    assert refused(lambda: run.export("merged", dtpye="float32")) == ["dtpye: unknown key; did you mean 'dtype'?"]
    assert refused(lambda: run.export({"type": "gguf", "types": 3})) == ["types: expected a list, got 3"]
    (combined,) = refused(lambda: run.export("merged", combine={"wieghts": [1]}))
    assert combined == "wieghts: unknown key; did you mean 'weights'?"
    assert refused(lambda: lowrank.rows(ROWS, fromat="alpaca")) == ["fromat: unknown key; did you mean 'format'?"]
    source = {"rows": ROWS, "max_samples": "few"}
    assert refused(lambda: lowrank.evaluate(model, source)) == ["max_samples: expected a whole number, got 'few'"]


def test_serve_answers_from_a_thread(run: lowrank.TrainedRun) -> None:
    openai = pytest.importorskip("openai")
    with lowrank.serve(run.path) as server:
        assert server.models == ["base", "r4", "r8"]
        client = openai.OpenAI(base_url=server.url, api_key=server.token)
        reply = client.chat.completions.create(
            model="r8", messages=[{"role": "user", "content": "Say 3."}], max_tokens=6, temperature=0
        )
    assert reply.choices[0].message.content.strip() == run.load().generate("Say 3.", "r8", max_new_tokens=6).strip()
    assert not server._thread.is_alive()


class _FocalSettings(Settings):
    type: Literal["tests.api.test_front_door:Focal"] = "tests.api.test_front_door:Focal"
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
    assert written["jobs"][0]["objective"]["type"] == "tests.api.test_front_door:Focal"
    with pytest.raises(lowrank.ConfigError, match="--allow-code"):  # what a file says later is as closed as ever
        validate_settings(
            {**QUICK, "data": "lowrank/demo", "output_dir": "x", "objective": "tests.api.test_front_door:Focal"}
        )
    with pytest.raises(lowrank.ConfigError, match=r"objective: .* cannot be used"):
        lowrank.train(**settings(output_dir=tmp_path / "none", objective=3))


class Scaled(Lora):
    """A variant as docs/add-a-variant.md has it."""

    class Config(AdapterSettings):
        type: Literal["tests.api.test_front_door:Scaled"] = "tests.api.test_front_door:Scaled"

        def build(self) -> Scaled:
            return Scaled()


@pytest.mark.parametrize(
    ("given", "type_name"),
    [
        ({"adapter": DoraConfig}, "dora"),
        ({"adapter": {"type": DoraConfig, "rank": 4}}, "dora"),
        ({"adapter": Scaled}, "tests.api.test_front_door:Scaled"),
        ({"adapter": Scaled.Config}, "tests.api.test_front_door:Scaled"),
        ({"adapter": Scaled.Config(rank=4)}, "tests.api.test_front_door:Scaled"),
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


def test_all_kinds_of_rows_are_the_same_rows() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    kinds: list[Any] = [
        rows, tuple(rows), datasets.Dataset.from_list(rows), pandas.DataFrame(rows), iter(rows), lambda: iter(rows)
    ]  # fmt: skip
    sources = [keep_rows(kind) for kind in kinds]
    assert len({source.path for source in sources}) == 1
    assert [row.values for row in read_rows(sources[0], seed=0)] == rows
    rows[0]["prompt"] = "changed afterwards"
    assert next(iter(read_rows(sources[0], seed=0))).values["prompt"] == "a"
    assert keep_rows(rows).path != sources[0].path


def test_rows_have_no_path() -> None:
    with pytest.raises(lowrank.ConfigError, match="rows: they are here, so they have no path"):
        lowrank.rows(ROWS, path="other.json")


def test_rows_that_are_none_say_so(tmp_path: Path) -> None:
    for wrong, message in (
        ([], "nothing to learn from"),
        (7, "not a int"),
        ({"train": 7}, "not a int"),
        ({"train": {"rows": []}}, "no rows"),
        (datasets.DatasetDict(a=datasets.Dataset.from_list(ROWS)), "a"),
    ):
        with pytest.raises(lowrank.LowrankError, match=message):
            lowrank.train(**{**settings(output_dir=tmp_path / "x"), "data": wrong})
    assert not (tmp_path / "x").exists()
    kept = keep_rows([*ROWS, "no dict", {"messages": object()}])
    problems = [row.problem for row in read_rows(kept, seed=0) if row.problem]
    assert problems == ["not an object: the row is a str", problems[1]]
    assert "row 26: a object" in str(problems[1])


def test_rows_in_memory_go_by_the_argument_they_were_given_as(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refused_rows(**given: Any) -> list[str]:
        with pytest.raises(lowrank.DataError) as caught:
            lowrank.train(**settings(output_dir=tmp_path / "run", **given))
        return str(caught.value).splitlines()[1:]

    (text,) = refused_rows(data={"train": ROWS, "eval": [{"a": 1}]})
    assert text.startswith("  - eval.0: the rows given as data.eval: no column plays")
    (text,) = refused_rows(data={"train": [{"rows": ROWS}, {"rows": [{"a": 1}]}]})
    assert text.startswith("  - train.1: the rows given as data.train.1: no column plays")
    (text,) = refused_rows(data={"train": [{"rows": ROWS}], "max_samples": 4}, objective="dpo")[:1]
    assert text.startswith("  - train.0: the rows given as data.train (format messages) gives Conversation")
    with pytest.raises(lowrank.DataError, match=r"the rows given as data.train: 1 row \(row 25\) of 25 left out"):
        lowrank.train(**settings(output_dir=tmp_path / "run", data=[*ROWS, "no dict"]), strict=True)
    with pytest.raises(lowrank.DataError, match="the rows in memory: split 'train\\[' cannot be read"):
        lowrank.train(**settings(output_dir=tmp_path / "run", data={"train": [{"rows": ROWS, "split": "train["}]}))
    with pytest.raises(lowrank.DataError, match="the rows given as data: format not recognized"):
        read_questions(keep_rows([{"a": 1}]))
    with caplog.at_level(logging.WARNING, logger="lowrank"):
        lowrank.train(**settings(output_dir=tmp_path / "run", max_steps=1, data=[*ROWS, "no dict"]))
    assert "the rows given as data.train: 1 row (row 25)" in caplog.text
    assert "memory:" not in caplog.text
    jobs = [{"name": "good", "data": ROWS}, {"name": "bad", "data": [{"a": 1}]}]
    with pytest.raises(lowrank.DataError, match=r"(?s)^bad: .*- train\.0: the rows given as data\.train:"):
        lowrank.train(**{**settings(output_dir=tmp_path / "jobs"), "jobs": jobs})


def test_rows_are_forgotten_with_what_named_them() -> None:
    source = keep_rows([{"text": "only here"}])
    path = source.path
    assert next(iter(read_rows(source, seed=0))).values == {"text": "only here"}
    del source
    with pytest.raises(lowrank.DataError, match="give them again"):
        list(read_rows(SourceConfig(path=path), seed=0))


def test_a_file_with_keywords_over_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: lowrank/tiny\ndata: lowrank/demo\nadapter: {rank: 2, dropout: 0.1}\nmax_steps: 50\n")
    run = lowrank.train(file, max_steps=1, adapter={"rank": 4}, data=ROWS, output_dir=str(tmp_path / "run"))
    written = json.loads((run.path / "config.json").read_text())["jobs"][0]
    assert written["adapter"]["rank"] == 4
    assert written["adapter"]["dropout"] == 0.1
    assert written["data"]["train"][0]["path"].startswith("memory:")
    assert run.summary["jobs"]["default"]["steps"] == 1
    other = lowrank.train(file, max_steps=1, objective=Focal.Config(), data=ROWS, output_dir=str(tmp_path / "other"))
    written = json.loads((other.path / "config.json").read_text())["jobs"][0]
    assert written["objective"]["type"] == "tests.api.test_front_door:Focal"


def test_a_run_config_is_taken_as_it_is(tmp_path: Path) -> None:
    config = lowrank.RunConfig(**QUICK, data={"train": [lowrank.rows(ROWS)]}, output_dir=tmp_path / "run")  # type: ignore[arg-type]
    assert lowrank.train(config).path == tmp_path / "run"
    with pytest.raises(lowrank.ConfigError, match="put these into it: seed"):
        lowrank.train(config, seed=3)


def test_nothing_is_printed_and_the_process_is_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lowrank.kernels.host_memory as host_memory

    for name in ("keep_freed_memory", "start_again_without_cache"):
        monkeypatch.setattr(host_memory, name, lambda: pytest.fail("a library call changes the process"))
    with caplog.at_level(logging.INFO, logger="lowrank"):
        run = lowrank.train(**settings(output_dir=tmp_path / "run"))
        run.load().generate("Say 3.", max_new_tokens=2)
        run.export("merged", tmp_path / "merged")
    assert capfd.readouterr() == ("", "")
    assert any("loss" in record.message for record in caplog.records)
    rooms = Path(str(lowrank.__file__)).parent
    for file in rooms.rglob("*.py"):
        if file.relative_to(rooms).parts[0] not in ("cli", "board"):
            assert "keep_freed_memory()" not in file.read_text(encoding="utf-8").replace(
                "def keep_freed_memory()", ""
            ), file
            assert "= print" not in file.read_text(encoding="utf-8"), file


def test_a_reporter_ends_the_run_as_its_page_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/add-a-reporter.md").read_text("utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"lowrank": lowrank}
    exec(code, names)
    run = lowrank.train(**settings(output_dir=tmp_path / "run", max_steps=50), reporters=[names["EndAt"](1e9)])
    assert run.interrupted
    assert run.summary["jobs"]["default"]["steps"] < 50
    every = {each.__name__ for each in get_args(lowrank.Event)}
    assert {name for name in every if f"`{name}`" in page} == every <= set(lowrank.__all__)


def test_progress_on_the_terminal_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lowrank.train(**settings(output_dir=tmp_path / "run"), progress=True)
    assert "step 3/3" in capsys.readouterr().out


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(lowrank.OutputError, match="no run folder"):
        lowrank.TrainedRun(tmp_path)

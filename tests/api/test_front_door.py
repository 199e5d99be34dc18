"""`import lowrank`: cheap, complete, typed; and everything from rows in memory to an export, without knowing a room."""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pandas
import pytest

import lowrank
from lowrank.api.settings import plain_settings
from lowrank.api.training import _config
from lowrank.export.targets import merged
from tests.api.quick_run import QUICK, ROWS, settings
from tests.api.test_own_code import Focal


def test_importing_it_takes_nothing_heavy_along() -> None:
    heavy = ("torch", "transformers", "pydantic", "datasets", "numpy", "pandas", "IPython")
    script = f"import lowrank, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


def test_everything_offered_is_there_and_documented() -> None:
    for name in lowrank.__all__:
        thing = lowrank._verb(f"lowrank.{name}") if name in lowrank._VERBS else getattr(lowrank, name)
        assert name in ("__version__", "Event") or inspect.getdoc(thing), name
    assert set(lowrank.__all__) == {"__version__", *lowrank._VERBS, *lowrank._NAMES}
    assert dir(lowrank) == sorted(lowrank.__all__), "and nothing that it takes to offer it"
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
    questions, both = ["Say 3.", messages], ["r4", "r8"]
    alone = [model.generate("Say 3.", name, max_new_tokens=6) for name in both]
    assert model.generate(questions, both, max_new_tokens=6) == alone, "one adapter for each question"
    assert lowrank.generate(model, questions, tuple(both), max_new_tokens=6) == alone
    with pytest.raises(lowrank.ConfigError, match=r"one for each of the 2 questions, got 3 names; .*model\.compare"):
        model.generate(questions, ["r4", "r8", "r4"])
    with pytest.raises(lowrank.ConfigError, match=r"one name for one question, got \['r4', 'r8'\]; .*model\.compare"):
        model.generate("Say 3.", both)
    with pytest.raises(lowrank.ConfigError, match="got 3; "):
        model.generate(questions, cast(Any, 3))
    with pytest.raises(lowrank.ModelError) as caught:
        model.generate(questions, ["r5", "nobody"])
    assert [line.partition(";")[0] for line in caught.value.problems] == [
        "question 1: there is no adapter 'r5' here",
        "question 2: there is no adapter 'nobody' here",
    ]
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
    assert math.isnan(frame.loc[("base", "perplexity"), "gain"])
    alone = lowrank.evaluate(run.path, ROWS[:2], adapters="r8", metrics=())
    assert alone.index.names == ["adapter", "metric"]
    gains = alone[["gain", "gain_low", "gain_high"]]
    assert list(gains.dtypes) == [float] * 3, "where nothing has a gain too"
    assert gains.isna().all(axis=None)


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
        "max_tokens: unknown key; it is called 'max_new_tokens' here",
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
    assert written["objective"]["type"] == "tests.api.test_own_code:Focal"


def test_keys_with_dots_stand_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: lowrank/tiny\ndata: lowrank/demo\nadapter: {rank: 2, rank_pattern: {v_proj: 3}}\n")
    patterns = {"layers.0.self_attn.q_proj": 4, r"layers\.1\..*(?=k_proj).*": 6, 'say "q"': 5, "o_proj": 1}
    given = plain_settings(
        {"adapter": {"rank_pattern": patterns}, "data": {"chat_template_kwargs": {"a.b": "x=y"}}, "output_dir": "x"}
    )
    (job,) = _config(file, given).jobs
    assert job.adapter.rank == 2
    assert job.adapter.rank_pattern == {"v_proj": 3, **patterns}
    assert job.data.chat_template_kwargs == {"a.b": "x=y"}
    swept = plain_settings(
        {"sweep": {"grid": {"optimizer.learning_rate": [1e-4, 1e-5]}, "search": "none"}, "output_dir": "x"}
    )
    assert [job.optimizer.learning_rate for job in _config(file, swept).jobs] == [1e-4, 1e-5]


def test_settings_without_effect_are_named(caplog: pytest.LogCaptureFixture) -> None:
    values: dict[str, Any] = {"model": "lowrank/tiny", "data": "lowrank/demo", "output_dir": "x"}
    mixed = {"adapter": {"type": "hra", "rank": 4, "alpha": 3}}
    for config, given in ((None, {**values, **mixed}), (lowrank.RunConfig(**values, **mixed), {})):
        caplog.clear()
        _config(config, plain_settings(given))
        assert [record.message for record in caplog.records] == ["adapter.alpha has no effect with type: hra"]
    caplog.clear()
    _config(None, plain_settings({**values, "adapter": {"type": "hra", "rank": 4}}))
    assert not caplog.records


def test_a_function_that_fails_is_named_with_its_traceback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def show_loss(event: lowrank.Event) -> None:
        if isinstance(event, lowrank.StepDone):
            raise KeyError("losss")

    lowrank.train(**settings(output_dir=tmp_path / "run", max_steps=1), reporters=[show_loss])
    text = "show_loss failed and receives no more events: KeyError: 'losss'"
    assert [record.message for record in caplog.records if record.message.endswith(text)]
    (traced,) = [record for record in caplog.records if record.exc_info]
    assert traced.message.endswith("show_loss failed on StepDone:")
    assert "in show_loss" in str(caplog.text)


def test_messages_name_the_way_out_in_python_too(run: lowrank.TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(lowrank.OutputError, match=r"choose another folder \(-o FOLDER, output=\.\.\.\)"):
        run.export("merged", tmp_path / "full", adapters="r8")
    with pytest.raises(lowrank.ModelError, match=r"shorten it \(in `lowrank chat`: /undo, /reset\)"):
        run.load().generate("x " * 3000, "r8", max_new_tokens=2)


def test_a_run_config_is_taken_as_it_is(tmp_path: Path) -> None:
    config = lowrank.RunConfig(**QUICK, data={"train": [lowrank.rows(ROWS)]}, output_dir=tmp_path / "run")  # type: ignore[arg-type]
    assert lowrank.train(config).path == tmp_path / "run"
    with pytest.raises(lowrank.ConfigError, match="put these into it: seed"):
        lowrank.train(config, seed=3)


def test_nothing_is_printed_and_the_process_is_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lowrank.kernels.glibc_malloc as glibc_malloc

    for name in ("keep_freed_memory", "start_again_without_cache"):
        monkeypatch.setattr(glibc_malloc, name, lambda: pytest.fail("a library call changes the process"))
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

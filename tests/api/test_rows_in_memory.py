"""Rows in memory as a run's data: lists, frames, datasets, generators."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

import lowrank
from lowrank.data.config import SourceConfig
from lowrank.data.sources.memory import keep_rows
from lowrank.data.sources.rows import read_rows
from lowrank.evaluate.questions import read_questions
from lowrank.records import Conversation, Message
from tests.api.quick_run import ROWS, settings


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


def _spoken(row: Any, columns: Any, tags: Any) -> Conversation:
    del columns, tags
    return Conversation((Message("user", row["asked"]), Message("assistant", row["answered"])))


def _ending_in(end: str) -> Any:
    def spoken(row: Any, columns: Any, tags: Any) -> Conversation:
        return _spoken({**row, "answered": row["answered"] + end}, columns, tags)

    return spoken


def test_rows_take_a_function_as_their_format(tmp_path: Path) -> None:
    rows = [{"asked": f"Say {number}.", "answered": f"It is {number}."} for number in range(8)]
    source = lowrank.rows(rows, format=_spoken)
    assert source.format == f"{__name__}:_spoken"
    loud, quiet = (lowrank.rows(rows, format=_ending_in(end)) for end in ("!", ""))
    given: dict[str, Any] = {**settings(), "max_steps": 1}
    file = tmp_path / "run.yaml"
    file.write_text("model: lowrank/tiny\nmax_steps: 1\n")
    assert lowrank.train(**{**given, "data": source, "output_dir": tmp_path / "a"}).jobs == ["default"]
    assert lowrank.train(file, data={"train": [source, loud, quiet]}, output_dir=str(tmp_path / "b")).jobs == [
        "default"
    ]
    data: Any = {"train": [source], "eval": [loud]}
    config = lowrank.RunConfig(**{**given, "data": data, "output_dir": tmp_path / "c"})
    assert lowrank.train(config).jobs == ["default"]
    with pytest.raises(lowrank.ConfigError, match=r"two functions for format are called .*spoken; name each its own"):
        lowrank.train(lowrank.RunConfig(**{**given, "data": {"train": [loud, quiet]}, "output_dir": tmp_path / "d"}))


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


def test_texts_in_the_place_of_rows_are_answered_with_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def refused(data: Any) -> list[str]:
        with pytest.raises(lowrank.DataError) as caught:
            lowrank.train(**{**settings(output_dir=tmp_path / "x"), "data": data})
        return str(caught.value).splitlines()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    as_rows = 'text itself is given as rows, in Python data=[{"text": "..."}]'
    texts = refused(["a", "How are you?", *["Fine, thanks."] * 30])
    assert len(texts) == 22
    assert texts[1].startswith("  - train.0: there is no file or folder a, and 'a' cannot be loaded from the hub")
    assert texts[1].endswith(as_rows)
    assert texts[2] == f"  - train.1: there is no file or folder How are you?; {as_rows}"
    assert texts[-1] == "  - and 12 more"
    assert refused("Once upon a time " * 40)[1].endswith(as_rows)
    assert as_rows not in refused("my rows.json")[1]
    expected = f"data: rows are dicts, and the first of these is a str; {as_rows}"
    assert refused(iter(["a", "b"])) == refused({"train": {"rows": ["a"]}}) == [expected]
    with pytest.raises(lowrank.ConfigError, match="give a file, a folder, a hub name, or in Python rows"):
        lowrank.RunConfig(**settings(data={"train": []}, output_dir="x"))


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

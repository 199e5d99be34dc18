"""What `lowrank predict` and `lowrank eval` left, as report.html and the board's Measure page show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowrank.report.measured import read_evaluations, read_predictions

MESSAGE = {"role": "user", "content": "?"}


def left(folder: Path, metrics: Any, *lines: str) -> Path:
    """A run's folder `predict`."""
    place = folder / "predict" / "rows"
    place.mkdir(parents=True, exist_ok=True)
    (place / "metrics.json").write_text(json.dumps({"rows": 3, "metrics": metrics}))
    (place / "predictions.jsonl").write_text("\n".join(lines))
    return folder / "predict"


def line(prompt: Any, **answers: Any) -> str:
    return json.dumps({"prompt": prompt, "label": None, "predictions": answers or {"base": "a"}})


def test_what_is_no_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    """Run folders come from anywhere."""
    prompts: list[Any] = [[{**MESSAGE, "images": 3}], [{**MESSAGE, "images": ["gone.png"]}], None, [{"content": [4]}]]
    strange = [line(3), line(["no turn"]), "[" * 100_000, "1" * 10_000, '{"torn', "7", "{}"]
    metrics = {"base": {"exact_match": {"value": 1.0, "interval": None}}}
    (found,) = read_predictions(left(tmp_path, metrics, *strange[:4], *map(line, prompts), *strange[4:]), 30)
    pictures = [[message["pictures"] for message in row.prompt] for row in found.rows]
    assert pictures == [[[]], [[("gone.png", None)]], [], [[]]]
    assert found.num_strange == len(strange)
    assert found.metric_names == ("exact_match",)  # the table's columns, whatever the rows say
    assert {type(message["content"]) for row in found.rows for message in row.prompt} == {str}


@pytest.mark.parametrize(
    "metrics", [[1], {"base": 3}, {"base": {"a": None, "b": {"value": "x"}, "c": {"value": 1, "interval": [2]}}}]
)
def test_what_is_no_metric_is_no_column(metrics: Any, tmp_path: Path) -> None:
    (found,) = read_predictions(left(tmp_path, metrics, line([MESSAGE])), 30)
    assert found.metric_names == ()


def test_rows_in_which_the_models_differ_come_first(tmp_path: Path) -> None:
    alike, other, silent = ({"base": "a", "r4": text} for text in ("a", "b", None))
    lines = [line([MESSAGE], **each) for each in (alike, other, silent)]
    (found,) = read_predictions(left(tmp_path, {}, *lines), 2)
    assert [row.predictions for row in found.rows] == [other, silent]


def test_evaluations_side_by_side(tmp_path: Path) -> None:
    results = {"mmlu": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "x"}, "strange": 3}
    for name, content in (("base", {"results": results}), ("r4", {"results": {"mmlu": {"acc,none": 0.6}}}), ("x", [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    found = read_evaluations(tmp_path)
    assert found.models == ("base", "r4")
    assert found.rows == (("mmlu", "acc", [(0.5, 0.1), (0.6, None)]),)

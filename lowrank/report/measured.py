"""What `lowrank predict` and `lowrank eval` left in a run folder, for pages.

Run folders come from anywhere: what these commands do not write is left out, and lines of answers that are none are
counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.errors import ModelError
from lowrank.foreign_files import find_json, parse_json
from lowrank.report.thumbnails import read_thumbnails

_LINES, _LONGEST_LINE = 500, 4 << 20
"""Of the answers that are looked at; a longer line is in pieces that are none."""
_NO_MEASURE = ("sample_len", "alias")
"""Beside the metrics of lm-eval."""


@dataclass(frozen=True)
class AnsweredRow:
    """A question, and what each model answered."""

    prompt: tuple[dict[str, Any], ...]
    """Messages: `role`, `content`, and `pictures`, (name, picture as data or None where there is none) each."""
    label: str
    predictions: Mapping[str, str | None]
    """None where there is no answer."""
    problems: Mapping[str, str]
    """Why there is none."""


@dataclass(frozen=True)
class Predictions:
    """Of one file of questions."""

    name: str
    num_rows: int
    metrics: Mapping[str, Mapping[str, Any]]
    """By model and name: `value`, and `interval` or None."""
    metric_names: tuple[str, ...]
    """Of all models."""
    unanswered: Mapping[str, int]
    rows: tuple[AnsweredRow, ...]
    """The first, those before in which the models differ."""
    num_strange: int
    """Lines among those that were looked at that are no answers."""


@dataclass(frozen=True)
class Evaluations:
    """Of all models that lm-eval has asked."""

    models: tuple[str, ...]
    rows: tuple[tuple[str, str, list[tuple[float, float | None] | None]], ...]
    """(task, metric, (value, its standard error or None) or None for each model)."""


def read_predictions(folder: Path, most: int) -> list[Predictions]:
    """What lies in a run's folder `predict`, with up to `most` rows of each."""
    return [_predictions(each, most) for each in _folders(folder) if (each / "metrics.json").is_file()]


def read_evaluations(folder: Path) -> Evaluations:
    """What lies in a run's folder `eval`."""
    models: list[str] = []
    table: dict[tuple[str, str], dict[str, tuple[float, float | None]]] = {}
    for path in _folders(folder):
        results = (find_json(path / "results.json") or {}).get("results")
        if not isinstance(results, dict):
            continue
        models.append(path.name)
        for task, own in results.items():
            for key, value in own.items() if isinstance(own, dict) else ():
                metric, _, kind = key.partition(",")
                if _is_number(value) and "_stderr" not in metric and metric not in _NO_MEASURE:
                    error = own.get(f"{metric}_stderr,{kind}")
                    spread = error if _is_number(error) else None
                    table.setdefault((task, metric), {})[path.name] = (value, spread)
    rows = tuple((task, metric, [own.get(model) for model in models]) for (task, metric), own in table.items())
    return Evaluations(tuple(models), rows)


def _predictions(folder: Path, most: int) -> Predictions:
    content = find_json(folder / "metrics.json") or {}
    metrics = {
        model: {metric: {"interval": None, **each} for metric, each in own.items() if _is_measured(each)}
        for model, own in _mapping(content.get("metrics")).items()
        if isinstance(own, dict)
    }
    thumbnails = read_thumbnails(folder)
    lines = _first_lines(folder / "predictions.jsonl")
    rows = [_row(line, thumbnails) for line in lines if line is not None and _is_prediction(line)]
    strange = len(lines) - len(rows)
    rows.sort(key=lambda row: len(set(row.predictions.values())) == 1)
    silent = {str(model): number for model, number in _mapping(content.get("unanswered")).items() if _is_number(number)}
    number = content.get("rows")
    return Predictions(
        name=folder.name,
        num_rows=number if isinstance(number, int) else len(rows),
        metrics=metrics,
        metric_names=tuple(dict.fromkeys(metric for own in metrics.values() for metric in own)),
        unanswered=silent,
        rows=tuple(rows[:most]),
        num_strange=strange,
    )


def _row(line: Mapping[str, Any], thumbnails: Mapping[str, str]) -> AnsweredRow:
    messages = []
    for message in line.get("prompt") or ():
        pictures = message.get("images")
        names = [str(picture) for picture in pictures] if isinstance(pictures, list) else []
        messages.append(
            {
                "role": _text(message.get("role")),
                "content": _text(message.get("content")),
                "pictures": [(name, thumbnails.get(name)) for name in names],  # a name alone where it had gone
            }
        )
    predictions = {model: None if text is None else _text(text) for model, text in line["predictions"].items()}
    problems = {model: _text(problem) for model, problem in _mapping(line.get("problems")).items()}
    return AnsweredRow(tuple(messages), _text(line.get("label")), predictions, problems)


def _first_lines(path: Path) -> list[dict[str, Any] | None]:
    """The objects in the first lines of a file; None for those that are none."""
    found: list[dict[str, Any] | None] = []
    with suppress(OSError), open(path, "rb") as file:
        for _ in range(_LINES):
            line = file.readline(_LONGEST_LINE)
            if not line:
                break
            try:
                found.append(parse_json(line.decode("utf-8", "replace"), path.name))
            except ModelError:
                found.append(None)
    return found


def _is_measured(metric: Any) -> bool:
    """Whether it is a metric as `lowrank predict` writes it."""
    if not isinstance(metric, dict) or not _is_number(metric.get("value")):
        return False
    ends = metric.get("interval") or (0.0, 0.0)
    return isinstance(ends, (list, tuple)) and len(ends) == 2 and all(map(_is_number, ends))


def _is_prediction(line: Mapping[str, Any]) -> bool:
    """The same of a line of answers."""
    if not isinstance(line.get("predictions"), dict):
        return False
    prompt = line.get("prompt") or []
    return isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []

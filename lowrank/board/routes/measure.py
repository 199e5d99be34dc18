"""Measure it: answers to the questions of a file with intervals, and lm-eval's tasks."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import Field
from starlette.exceptions import HTTPException

from lowrank.board.body import BoardRequest
from lowrank.board.data_files import BUILT_IN, data_files
from lowrank.board.page import answer_page, board_of
from lowrank.board.places import child_of
from lowrank.board.progress import progress_of
from lowrank.board.routes.runs import about
from lowrank.board.runs import checkpoints, read_json
from lowrank.board.state import Board
from lowrank.errors import ModelError
from lowrank.foreign_files import parse_json
from lowrank.report.thumbnails import read_thumbnails

router = APIRouter()
_ROWS = 30
_LINES, _LONGEST_LINE = 300, 4 << 20
"""Of the rows that are looked at; a longer line is in pieces that are none."""
_TASKS = re.compile(r"[\w\-,.:/ ]{1,400}")


@router.get("/runs/{name}/measure")
def measure(request: Request, name: str) -> Response:
    """What was measured of a run, and forms to measure more."""
    board = board_of(request)
    return answer_page(
        request, "measure.html", place="runs", tab="measure", files=data_files(board.places), built_in=BUILT_IN,
        **about(request, name), **_measured(board, name),
    )  # fmt: skip


@router.get("/part/measure/{name}")
def measure_part(request: Request, name: str) -> Response:
    """What changes on that page."""
    board = board_of(request)
    return answer_page(request, "part_measure.html", tab="measure", **about(request, name), **_measured(board, name))


class Predict(BoardRequest):
    """As `lowrank predict` has it; `which`: best, last, or the name of a checkpoint."""

    data: str
    which: str = "best"
    adapters: list[str] = Field(default_factory=list)
    max_samples: int | None = Field(None, ge=1)
    max_new_tokens: int = Field(256, ge=1, le=8192)
    temperature: float = Field(0.0, ge=0, le=5)


@router.post("/api/runs/{name}/predict")
def predict(request: Request, name: str, body: Predict) -> Response:
    """Put `lowrank predict` into the queue."""
    board = board_of(request)
    data = body.data if body.data in BUILT_IN else board.places.shown(board.places.readable_data(body.data))
    arguments = ["predict", *_target(board, name, body.which), "--data", data]
    arguments += ["--max-new-tokens", str(body.max_new_tokens)]
    if body.max_samples is not None:
        arguments += ["--max-samples", str(body.max_samples)]
    if body.temperature:
        arguments += ["--temperature", str(body.temperature)]
    if body.adapters:
        arguments += ["--adapter", ",".join(_known(board, name, body.adapters))]
    task = board.queue.add("predict", board.arguments(*arguments, "--json"), subject=name)
    return JSONResponse({"task": task.id})


class Eval(BoardRequest):
    """As `lowrank eval` has it."""

    tasks: str
    which: str = "best"
    limit: int | None = Field(None, ge=1)
    num_fewshot: int | None = Field(None, ge=0)
    chat: bool = False


@router.post("/api/runs/{name}/eval")
def evaluate(request: Request, name: str, body: Eval) -> Response:
    """Put `lowrank eval` into the queue."""
    board = board_of(request)
    tasks = body.tasks.replace(" ", "")
    if not _TASKS.fullmatch(tasks) or tasks.startswith("-"):
        raise HTTPException(400, "tasks are names with commas between them, as mmlu,gsm8k")
    arguments = ["eval", *_target(board, name, body.which), "--tasks", tasks]
    arguments += ["--limit", str(body.limit)] if body.limit else []
    arguments += ["--num-fewshot", str(body.num_fewshot)] if body.num_fewshot is not None else []
    arguments += ["--apply-chat-template"] if body.chat else []
    task = board.queue.add("eval", board.arguments(*arguments, "--json"), subject=name)
    return JSONResponse({"task": task.id})


@router.get("/runs/{name}/predictions/{data}")
def predictions(request: Request, name: str, data: str) -> Response:
    """All answers as a file."""
    path = child_of(board_of(request).places.run(name) / "predict", data) / "predictions.jsonl"
    if not path.is_file() or path.is_symlink():
        raise HTTPException(404, "there are no such predictions")
    return FileResponse(path, media_type="application/jsonl", filename=f"{name}-{data}.jsonl")


def _target(board: Board, name: str, which: str) -> list[str]:
    run = board.run(name)
    if run is None:
        raise HTTPException(404, f"there is no run {name[:80]!r}")
    shown = board.places.shown(run.folder)
    if which in ("best", "last"):
        return [shown, *(["--last"] if which == "last" else [])]
    if which not in checkpoints(run.folder):
        raise HTTPException(404, "there is no such checkpoint")
    return [f"{shown}/checkpoints/{which}"]


def _known(board: Board, name: str, adapters: list[str]) -> list[str]:
    run = board.run(name)
    known = {"base", *(run.jobs if run else ())}
    if not set(adapters) <= known:
        raise HTTPException(404, f"the run has {', '.join(sorted(known))}")
    return adapters


def _measured(board: Board, name: str) -> dict[str, Any]:
    folder = board.places.run(name)
    tasks = [
        (task, outcome, progress_of(board.queue.tasks.folder(task.id)) if outcome.state == "running" else None)
        for task, outcome in board.tasks_about(name, "predict", "eval")
    ]
    return {
        "tasks": tasks[:8],
        "predicted": [_prediction(path) for path in _folders(folder / "predict") if (path / "metrics.json").is_file()],
        "evaluated": _evaluation(folder / "eval"),
    }


def _prediction(folder: Path) -> dict[str, Any]:
    content = read_json(folder / "metrics.json")
    given = content.get("metrics")
    metrics = {
        model: {metric: each for metric, each in own.items() if _is_measured(each)}
        for model, own in (given.items() if isinstance(given, dict) else ())
        if isinstance(own, dict)
    }
    names = list(dict.fromkeys(metric for own in metrics.values() for metric in own))
    rows = [row for row in _first_lines(folder / "predictions.jsonl") if _is_prediction(row)]
    rows.sort(key=lambda row: len({str(text) for text in row["predictions"].values()}) == 1)
    shown, thumbnails = rows[:_ROWS], read_thumbnails(folder)
    for row in shown:
        for message in row.get("prompt") or ():
            pictures = message.get("images")
            message["thumbnails"] = [  # a name alone where the picture had gone
                (str(picture), thumbnails.get(str(picture)))
                for picture in (pictures if isinstance(pictures, list) else ())
            ]
    return {"name": folder.name, "rows": content.get("rows"), "metrics": metrics, "names": names, "shown": shown}


def _first_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in the first lines of a file; those that are none are passed over."""
    found: list[dict[str, Any]] = []
    with suppress(OSError), open(path, "rb") as file:
        for _ in range(_LINES):
            line = file.readline(_LONGEST_LINE)
            if not line:
                break
            with suppress(ModelError):
                found.append(parse_json(line.decode("utf-8", "replace"), path.name))
    return found


def _is_measured(metric: Any) -> bool:
    """Whether it is a metric as `lowrank predict` writes it: run folders come from anywhere."""
    if not isinstance(metric, dict) or not isinstance(metric.get("value"), (int, float)):
        return False
    ends = metric.get("interval") or (0.0, 0.0)
    return isinstance(ends, (list, tuple)) and len(ends) == 2 and all(isinstance(end, (int, float)) for end in ends)


def _is_prediction(row: dict[str, Any]) -> bool:
    """The same of a line of predictions."""
    if not isinstance(row.get("predictions"), dict):
        return False
    prompt = row.get("prompt") or []
    return isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)


def _evaluation(folder: Path) -> dict[str, Any]:
    """`{"models": [...], "rows": [(task, metric, [(value, standard error), ...])]}` of what lm-eval left."""
    models, table = [], {}
    for path in _folders(folder):
        content = read_json(path / "results.json").get("results")
        if not isinstance(content, dict):
            continue
        models.append(path.name)
        for task, own in content.items():
            for key, value in own.items() if isinstance(own, dict) else ():
                metric, _, kind = key.partition(",")
                if (
                    isinstance(value, (int, float))
                    and "_stderr" not in metric
                    and metric not in ("sample_len", "alias")
                ):
                    error = own.get(f"{metric}_stderr,{kind}")
                    spread = error if isinstance(error, (int, float)) else None
                    table.setdefault((task, metric), {})[path.name] = (value, spread)
    return {"models": models, "rows": [(*key, [own.get(model) for model in models]) for key, own in table.items()]}


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []

"""Measure it: answers to the questions of a file with intervals, and lm-eval's tasks."""

from __future__ import annotations

import re
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
from lowrank.board.runs import checkpoints
from lowrank.board.state import Board
from lowrank.report.measured import read_evaluations, read_predictions

router = APIRouter()
_ROWS = 8
"""Of each file of questions that are shown."""
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
        "predicted": read_predictions(folder / "predict", _ROWS),
        "evaluated": read_evaluations(folder / "eval"),
    }

"""A run: its curves, verdicts, log, and what can be done with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import Field
from starlette.exceptions import HTTPException

from lowrank.board.body import BoardRequest
from lowrank.board.job_lines import job_lines
from lowrank.board.last_line import message_lines
from lowrank.board.live_commands import accepts_commands, commands_of, live_memory
from lowrank.board.page import answer_page, board_of
from lowrank.board.progress import progress_of
from lowrank.board.runs import BROKEN, RUNNING, RunEntry, checkpoints
from lowrank.board.stream import event, events
from lowrank.board.sweep_table import sweep_table
from lowrank.board.tasks import ERRORS, OUTPUT
from lowrank.checkpoints.live_commands import LOG, command_folder

router = APIRouter()
_LOG_LINES = 200
_REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
)


@router.get("/runs/{name}")
def run_page(request: Request, name: str) -> Response:
    """A run, or the task that will make it."""
    values = about(request, name)
    return answer_page(request, "run.html", place="runs", tab="watch", points=_points(request, name), **values)


@router.get("/part/runs/{name}/{piece}")
def run_part(request: Request, name: str, piece: Literal["head", "details"]) -> Response:
    """What changes on a run's page: above the curves, and below them."""
    return answer_page(request, f"part_run_{piece}.html", tab="watch", **about(request, name))


@router.get("/api/runs/{name}/curves")
def curves(request: Request, name: str, low: float = -math.inf, high: float = math.inf) -> Response:
    """Its points between two steps, thinned, and the position in the file up to which they go."""
    return JSONResponse(_points(request, name, low, high))


def _points(request: Request, name: str, low: float = -math.inf, high: float = math.inf) -> dict[str, Any]:
    board = board_of(request)
    position, jobs = board.curves.of(board.places.run(name)).thinned(low, high)
    return {"jobs": jobs, "position": position}


@router.get("/api/runs/{name}/live")
async def live(request: Request, name: str, position: str = "") -> Response:
    """New points as they are written, and when anything else of the run looks different."""
    board = board_of(request)
    folder = board.places.run(name)
    place = [request.headers.get("last-event-id") or position]
    seen = [""]

    def look() -> list[str]:
        messages = []
        after = board.curves.of(folder).after(place[0])
        if after.position != place[0]:
            place[0] = after.position
            if after.anew:
                messages.append(event("anew", None, id=place[0]))
            else:
                points = [_point(end, each) for end, each in after.points if "loss" in each]
                messages.append(event("points", points, id=place[0]))
        now = f"{board.fingerprint()} {place[0]} {_output_size(request, name)} {_commands_size(folder)}"
        if now != seen[0]:
            seen[0] = now
            messages.append(event("changed", None))
        return messages

    return await events(request, look, every=0.7, most=board.options.streams)


@router.post("/api/runs/{name}/stop")
def stop(request: Request, name: str) -> Response:
    """Save a checkpoint and end. A run from a terminal is asked in the same way."""
    board = board_of(request)
    stopped = False
    for task in board.train_tasks(name):
        if not board.queue.outcome(task).over:
            board.queue.stop(task.id)
            stopped = True
    run = board.run(name)
    if not stopped and run is not None and run.state == RUNNING:
        (run.folder / "stop").touch()
    return JSONResponse({})


class Resume(BoardRequest):
    """`changes`: `KEY=VALUE` words over the run's settings, as num_train_epochs=5."""

    changes: list[str] = Field(default_factory=list)


@router.post("/api/runs/{name}/resume")
def resume(request: Request, name: str, body: Resume) -> Response:
    """Go on from the last checkpoint."""
    board = board_of(request)
    if any(not board.queue.outcome(task).over for task in board.train_tasks(name)):
        raise HTTPException(409, "it runs or waits already")
    if any(change.partition("=")[0] not in _MAY_CHANGE for change in body.changes):
        raise HTTPException(400, f"only {', '.join(sorted(_MAY_CHANGE))} may change here")
    run = board.run(name)
    tasks = board.train_tasks(name)
    if run is not None and run.config:
        settings = f"{board.places.shown(run.folder)}/config.json"
    elif tasks:
        settings = f"{board.places.shown(board.queue.tasks.folder(tasks[-1].id))}/run.yaml"
    else:
        raise HTTPException(404, f"there is no run {name[:80]!r}")
    output = f"output_dir={board.places.shown(board.places.run(name))}"
    goes_on = ["resume=true", "overwrite=false"] if run is not None else []
    arguments = board.arguments("train", settings, output, *goes_on, *body.changes, "--json")
    task = board.queue.add("train", arguments, subject=name, device=_device(run))
    return JSONResponse({"task": task.id})


_MAY_CHANGE = frozenset({"num_train_epochs", "max_steps", "save_steps", "eval_steps", "logging_steps"})


@router.get("/runs/{name}/report")
def report(request: Request, name: str) -> Response:
    """The run's own page, in a sandbox: its scripts are its own."""
    path = board_of(request).places.run(name) / "report.html"
    if not path.is_file() or path.is_symlink():
        raise HTTPException(404, "the report is written when a run ends")
    return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": _REPORT_POLICY})


@router.get("/runs/{name}/settings.yaml")
def settings_file(request: Request, name: str) -> Response:
    """The settings the run was started with, as a file to export."""
    board = board_of(request)
    for task in reversed(board.train_tasks(name)):
        path = board.queue.tasks.folder(task.id) / "run.yaml"
        if path.is_file():
            return FileResponse(path, media_type="application/yaml", filename=f"{name}.yaml")
    path = board.places.run(name) / "config.json"
    if not path.is_file():
        raise HTTPException(404, "no settings were kept")
    return FileResponse(path, media_type="application/json", filename=f"{name}.json")


def about(request: Request, name: str) -> dict[str, Any]:
    """What every page of a run shows. 404 where there is neither a run nor a task of that name."""
    board = board_of(request)
    run, tasks = board.run(name), board.train_tasks(name)
    if run is None and not tasks:
        raise HTTPException(404, f"there is no run {name[:80]!r}")
    task = tasks[-1] if tasks else None
    outcome = board.queue.outcome(task) if task else None
    state = _state(run, outcome.state if outcome else None)
    waiting = [each.id for each in board.queue.waiting()]
    found = board.curves.of(board.places.run(name))
    folder = board.queue.tasks.folder(task.id) if task else None
    live = folder is not None and outcome is not None and not outcome.over
    trains = run is not None and state == RUNNING and run.state == RUNNING
    jobs = job_lines(run, found.last_steps(), found.ends, folder, trains=trains)
    return {
        "name": name,
        "run": run,
        "task": task,
        "outcome": outcome,
        "state_of_run": state,
        "position": waiting.index(task.id) + 1 if task and task.id in waiting else 0,
        "stopping": bool(live and folder and (folder / "stop").exists()),
        "progress": progress_of(folder) if live and folder else None,
        "jobs": jobs,
        "colors": _colors(found.last_steps(), jobs),
        "steered": trains and run is not None and accepts_commands(run.folder),
        "memory": live_memory(run.folder) if run is not None and trains else {},
        "commands": commands_of(board.places, name) if run is not None else [],
        "sweep": sweep_table(run.folder) if run is not None else None,
        "notices": [each for each in found.notices if each.get("level") == "warning"][:50],
        "log": _log(board, folder, found.notices),
        "checkpoints": checkpoints(run.folder) if run else [],
        "can_resume": state in ("stopped", "died", "failed") and (run is not None),
        "has_report": run is not None and (run.folder / "report.html").is_file(),
        "summary": run.summary if run and state in ("done", "stopped") else {},
        "folder": board.places.folder,
    }


def _colors(steps: dict[str, float], jobs: list[dict[str, Any]]) -> dict[str, int]:
    """As the plot numbers its curves: in the order in which they began."""
    names = dict.fromkeys([*steps, *(job["name"] for job in jobs)])
    return {name: number for number, name in enumerate(names)}


def _state(run: RunEntry | None, task: str | None) -> str:
    if task in ("waiting", "running"):
        return task
    if run is not None and run.state == RUNNING:
        return RUNNING
    if task in ("failed", "died"):
        return task
    return run.state if run is not None else task or BROKEN


def _log(board: Any, folder: Any, notices: list[dict[str, Any]]) -> list[str]:
    if folder is not None:
        lines = message_lines(folder / ERRORS, _LOG_LINES)
        if lines:
            return lines
    return [str(each.get("text")) for each in notices][-_LOG_LINES:]


def _output_size(request: Request, name: str) -> int:
    board = board_of(request)
    tasks = board.train_tasks(name)
    try:
        return (board.queue.tasks.folder(tasks[-1].id) / OUTPUT).stat().st_size if tasks else 0
    except (OSError, KeyError):
        return 0


def _commands_size(folder: Path) -> int:
    """Of what the run replied."""
    try:
        return (command_folder(folder) / LOG).stat().st_size
    except OSError:
        return 0


def _point(end: int, entry: dict[str, Any]) -> dict[str, Any]:
    kept = {"end": end} | {key: entry.get(key) for key in ("event", "job", "step", "loss", "learning_rate")}
    if entry.get("event") == "eval":
        kept["metric"] = entry.get("metric", "loss")
        kept["score"] = (entry.get("metrics") or {}).get(kept["metric"])
    return kept


def _device(run: RunEntry | None) -> str:
    model = run.config.get("model") if run else None
    return str(model.get("device", "auto")) if isinstance(model, dict) else "auto"

"""The first page: what there is, what waits, and the machine. And tasks of any kind."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

from lowrank.board.body import BoardRequest
from lowrank.board.last_line import last_lines, message_lines
from lowrank.board.page import LANGUAGE_COOKIE, answer_page, board_of
from lowrank.board.progress import progress_of
from lowrank.board.stream import event, events
from lowrank.board.tasks import ERRORS, OUTPUT, RUNNING, WAITING, Task
from lowrank.board.texts import LANGUAGES

router = APIRouter()
_SHOWN = 60


@router.get("/health")
def health() -> dict[str, str]:
    """That the board is there."""
    return {"status": "ok"}


@router.get("/")
def start(request: Request) -> Response:
    """The first page."""
    return answer_page(request, "start.html", place="start", **_lists(request))


@router.get("/part/start")
def start_part(request: Request) -> Response:
    """What changes on the first page."""
    return answer_page(request, "part_start.html", **_lists(request))


@router.get("/api/live")
async def live(request: Request) -> Response:
    """Says when lists of runs or tasks look different."""
    board = board_of(request)
    seen = [""]

    def look() -> list[str]:
        now = board.fingerprint()
        if now == seen[0]:
            return []
        seen[0] = now
        return [event("changed", now)]

    return await events(request, look, every=1.0, most=board.options.streams)


@router.post("/language/{language}")
def language(request: Request, language: str, back: str = "/") -> Response:
    """Choose a language and go back to the page."""
    if language not in LANGUAGES:
        raise HTTPException(404, "no such language")
    to = back if back.startswith("/") and not back.startswith(("//", "/\\")) else "/"
    response = RedirectResponse(to, 303)
    response.set_cookie(LANGUAGE_COOKIE, language, max_age=365 * 86400, samesite="strict", httponly=True)
    return response


class Move(BoardRequest):
    """Where a waiting task goes: -1 earlier, 1 later, -999 to the front."""

    by: int


@router.post("/api/tasks/{name}/move")
def move(request: Request, name: str, body: Move) -> Response:
    """Change the order of the queue."""
    board_of(request).queue.move(_task(request, name).id, body.by)
    return JSONResponse({})


@router.post("/api/tasks/{name}/stop")
def stop(request: Request, name: str) -> Response:
    """Take a task out of the queue, or ask it to save and end."""
    board_of(request).queue.stop(_task(request, name).id)
    return JSONResponse({})


@router.post("/api/tasks/{name}/kill")
def kill(request: Request, name: str) -> Response:
    """End a task that was asked to stop and does not."""
    board_of(request).queue.kill(_task(request, name).id)
    return JSONResponse({})


@router.post("/api/tasks/{name}/forget")
def forget(request: Request, name: str) -> Response:
    """Take a task that is over out of the lists. What it wrote stays."""
    board, task = board_of(request), _task(request, name)
    if not board.queue.outcome(task).over:
        raise HTTPException(409, "it is not over yet")
    board.queue.tasks.remove(task)
    return JSONResponse({})


@router.get("/tasks/{name}")
def task_page(request: Request, name: str) -> Response:
    """A task: its command, its output, how it ended."""
    return answer_page(request, "task.html", place="start", **_about(request, _task(request, name)))


@router.get("/part/tasks/{name}")
def task_part(request: Request, name: str) -> Response:
    """What changes on a task's page."""
    return answer_page(request, "part_task.html", **_about(request, _task(request, name)))


def _task(request: Request, name: str) -> Task:
    task = board_of(request).queue.tasks.get(name)
    if task is None:
        raise HTTPException(404, f"there is no task {name[:80]!r}")
    return task


def _about(request: Request, task: Task) -> dict[str, Any]:
    board = board_of(request)
    folder = board.queue.tasks.folder(task.id)
    outcome = board.queue.outcome(task)
    waiting = [each.id for each in board.queue.waiting()]
    return {
        "task": task,
        "outcome": outcome,
        "position": waiting.index(task.id) + 1 if task.id in waiting else 0,
        "last_lines": message_lines(folder / ERRORS, 40),
        "output": last_lines(folder / OUTPUT, 20),
        "stopping": (folder / "stop").exists() and not outcome.over,
        "progress": progress_of(folder) if outcome.state == RUNNING else None,
        "folder": board.places.folder,
    }


def _lists(request: Request) -> dict[str, Any]:
    board = board_of(request)
    running = [(task, progress_of(board.queue.tasks.folder(task.id))) for task in board.queue.running()]
    waiting = board.queue.waiting()
    over = [(task, board.queue.outcome(task)) for task in reversed(board.queue.tasks.all())]
    over = [(task, outcome) for task, outcome in over if outcome.over and task.kind != "serve"]
    runs = board.runs()
    trained = {run.name for run in runs}
    failed = [(t, o) for t, o in over if t.kind != "train" or o.state in ("failed", "died") or t.subject not in trained]
    return {
        "running": running,
        "waiting": waiting,
        "recent": failed[:12],
        "runs": runs[:_SHOWN],
        "more_runs": max(0, len(runs) - _SHOWN),
        "machine": board.machine(),
        "folder": board.places.folder,
        "WAITING": WAITING,
    }

"""Export targets with their proof, single files to download, Ollama."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from lowrank.board.body import BoardRequest
from lowrank.board.main_settings import EXPORTS
from lowrank.board.page import answer_page, board_of
from lowrank.board.places import child_of, confined, free_name, safe_name
from lowrank.board.progress import progress_of
from lowrank.board.routes.runs import about
from lowrank.board.runs import read_json
from lowrank.board.state import Board

router = APIRouter()
_TYPES = re.compile(r"[a-z0-9_]{2,12}(,[a-z0-9_]{2,12}){0,7}")
_NAMES = re.compile(r"[A-Za-z0-9][\w.:/-]{0,120}")


@router.get("/runs/{name}/export")
def export_page(request: Request, name: str) -> Response:
    """What can be exported, and what was."""
    board = board_of(request)
    return answer_page(
        request,
        "export.html",
        place="runs",
        tab="export",
        targets=EXPORTS,
        **about(request, name),
        **_taken(board, name),
    )


@router.get("/part/export/{name}")
def export_part(request: Request, name: str) -> Response:
    """What changes on that page."""
    return answer_page(
        request, "part_export.html", tab="export", **about(request, name), **_taken(board_of(request), name)
    )


class Export(BoardRequest):
    """A target, whose adapter, and for GGUF which types."""

    target: str
    adapter: str = ""
    types: str = ""
    last: bool = False


@router.post("/api/runs/{name}/export")
def export(request: Request, name: str, body: Export) -> Response:
    """Put `lowrank export` into the queue."""
    board = board_of(request)
    run = board.run(name)
    if run is None:
        raise HTTPException(404, f"there is no run {name[:80]!r}")
    if body.target not in dict(EXPORTS) or (body.types and not _TYPES.fullmatch(body.types)):
        raise HTTPException(400, "there is no such target")
    if body.adapter and body.adapter not in run.jobs:
        raise HTTPException(404, f"the run has {', '.join(run.jobs)}")
    folder = free_name(
        board.places.exports, safe_name("-".join(filter(None, (name, body.adapter, body.target))), "export")
    )
    arguments = ["export", board.places.shown(run.folder), "--to", body.target, "-o", f"exports/{folder}"]
    arguments += ["--adapter", body.adapter] if body.adapter else []
    arguments += ["--type", body.types] if body.types and body.target in ("gguf", "ollama") else []
    arguments += ["--last"] if body.last else []
    board.places.exports.mkdir(exist_ok=True)
    task = board.queue.add(
        "export", board.arguments(*arguments, "--json"), subject=name, more={"folder": folder, "target": body.target}
    )
    return JSONResponse({"task": task.id})


class Deploy(BoardRequest):
    """A name for the model in Ollama."""

    name: str


@router.post("/api/exports/{folder}/deploy")
def deploy(request: Request, folder: str, body: Deploy) -> Response:
    """Put `lowrank deploy ollama` into the queue."""
    board = board_of(request)
    place = child_of(board.places.exports, folder)
    if not place.is_dir():
        raise HTTPException(404, "there is no such export")
    if not _NAMES.fullmatch(body.name):
        raise HTTPException(400, "a name in Ollama has letters, digits and any of . _ - : /")
    subject = next((t.subject for t in board.queue.tasks.all() if t.more.get("folder") == folder), folder)
    arguments = ["deploy", "ollama", body.name, board.places.shown(place), "--json"]
    task = board.queue.add("deploy", arguments, subject=subject, device="network")
    return JSONResponse({"task": task.id})


@router.get("/exports/{folder}/{file:path}")
def download(request: Request, folder: str, file: str) -> Response:
    """A single file of an export."""
    place = child_of(board_of(request).places.exports, folder)
    path = confined(file, (place,))
    if not path.is_file():
        raise HTTPException(404, "there is no such file")
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


def _taken(board: Board, name: str) -> dict[str, Any]:
    tasks = []
    for task, outcome in board.tasks_about(name, "export", "deploy"):
        folder = board.queue.tasks.folder(task.id)
        place = board.places.exports / str(task.more.get("folder", ""))
        result = board.queue.tasks.result(task) or {} if outcome.over else {}
        tasks.append(
            {
                "task": task,
                "outcome": outcome,
                "progress": progress_of(folder) if outcome.state == "running" else None,
                "files": _files(place) if task.kind == "export" and outcome.over else [],
                "proof": _proof(place, result) if task.kind == "export" else [],
                "folder": task.more.get("folder", ""),
                "target": task.more.get("target", ""),
            }
        )
    return {"taken": tasks[:20]}


def _proof(place: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparisons with base + adapter, one for each file."""
    targets = result.get("targets") if isinstance(result.get("targets"), dict) else None
    reports = list((targets or {}).values()) or [read_json(place / "export.json")]
    found = []
    for report in reports:
        for each in report.get("comparisons") or () if isinstance(report, dict) else ():
            if isinstance(each, dict):
                found.append({**each, "seconds": report.get("seconds"), "on": report.get("compared_on")})
    return found


def _files(place: Path) -> list[tuple[str, int]]:
    """Names relative to the export and bytes, the largest first."""
    found = []
    for path in place.rglob("*") if place.is_dir() and not place.is_symlink() else ():
        if path.is_file() and not path.is_symlink():
            found.append((path.relative_to(place).as_posix(), path.stat().st_size))
    return sorted(found, key=lambda each: -each[1])[:60]

"""Live commands to the jobs of a run that trains: the same files as `lowrank add`, `set`, `stop` and others write."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from lowrank.board.live_commands import CommandRequest, accepts_commands, draft_command, write_file
from lowrank.board.page import board_of, texts_of
from lowrank.board.runs import RUNNING
from lowrank.checkpoints.live_commands import replies, send
from lowrank.errors import LowrankError

router = APIRouter()


@router.post("/api/runs/{name}/commands/preview")
def preview(request: Request, name: str, body: CommandRequest) -> Response:
    """The command line that gives the same; or what is wrong with it."""
    board = board_of(request)
    try:
        draft = draft_command(board.places, name, body, allow_code=board.options.allow_code)
    except LowrankError as error:
        return JSONResponse({"problem": texts_of(request).reply(error)})
    return JSONResponse({"command_line": draft.command_line})


@router.post("/api/runs/{name}/commands")
def send_command(request: Request, name: str, body: CommandRequest) -> Response:
    """Put the command into the run's folder; the run replies between two of its steps."""
    board = board_of(request)
    run = board.run(name)
    if run is None:
        raise HTTPException(404, f"there is no run {name[:80]!r}")
    if run.state != RUNNING or not accepts_commands(run.folder):
        raise HTTPException(409, "the run is not training, so it takes no commands")
    draft = draft_command(board.places, name, body, allow_code=board.options.allow_code)
    write_file(draft)
    command = send(run.folder, draft.kind, draft.job, draft.values)
    return JSONResponse({"number": command.number, "command_line": draft.command_line})


@router.get("/api/runs/{name}/commands/{number}")
def reply(request: Request, name: str, number: int) -> Response:
    """What the run replied, as soon as it has."""
    found = replies(board_of(request).places.run(name)).get(number)
    if found is None:
        return JSONResponse({"answered": False})
    translated = texts_of(request).sentence(found.text)
    return JSONResponse({"answered": True, "done": found.done, "text": translated.text, "own": translated.own})

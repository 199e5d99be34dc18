"""Orders to the jobs of a run that trains: the same files as those of `lowrank add`, `set`, `stop` and the others."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from lowrank.board.orders import Wanted, accepts_orders, drafted, write_file
from lowrank.board.page import board_of, texts_of
from lowrank.board.runs import RUNNING
from lowrank.checkpoints.orders import answers, send
from lowrank.errors import LowrankError

router = APIRouter()


@router.post("/api/runs/{name}/orders/preview")
def preview(request: Request, name: str, body: Wanted) -> Response:
    """The command that the order would be; or what is wrong with it."""
    board = board_of(request)
    try:
        draft = drafted(board.places, name, body, allow_code=board.options.allow_code)
    except LowrankError as error:
        return JSONResponse({"problem": texts_of(request).reply(error)})
    return JSONResponse({"command": draft.command})


@router.post("/api/runs/{name}/orders")
def give(request: Request, name: str, body: Wanted) -> Response:
    """Put the order into the run's folder; the run answers between two of its steps."""
    board = board_of(request)
    run = board.run(name)
    if run is None:
        raise HTTPException(404, f"there is no run {name[:80]!r}")
    if run.state != RUNNING or not accepts_orders(run.folder):
        raise HTTPException(409, "the run is not training, so nobody would hear this")
    draft = drafted(board.places, name, body, allow_code=board.options.allow_code)
    write_file(draft)
    order = send(run.folder, draft.kind, draft.job, draft.values)
    return JSONResponse({"number": order.number, "command": draft.command})


@router.get("/api/runs/{name}/orders/{number}")
def answer(request: Request, name: str, number: int) -> Response:
    """What the run answered, as soon as it has."""
    found = answers(board_of(request).places.run(name)).get(number)
    if found is None:
        return JSONResponse({"answered": False})
    translated = texts_of(request).sentence(found.text)
    return JSONResponse({"answered": True, "done": found.done, "text": translated.text, "own": translated.own})

"""Data: what there is, uploads, and what a file or a draft of settings holds, as the data doctor sees it."""

from __future__ import annotations

import os
import secrets
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from lowrank.board.body import BoardRequest
from lowrank.board.data_files import BUILT_IN, data_files, named_sets
from lowrank.board.page import answer_page, board_of, texts_of
from lowrank.board.places import DATA_SUFFIXES, OutsideError, child_of, free_name, safe_name
from lowrank.board.texts import Texts
from lowrank.board.warm_worker import Superseded

router = APIRouter()
_DATASET_INFO = "dataset_info.json"


@router.get("/data")
def data(request: Request, look: str = "") -> Response:
    """All data, and one file looked through."""
    places = board_of(request).places
    return answer_page(
        request, "data.html", place="data", files=data_files(places), look=look, suffixes=DATA_SUFFIXES,
        named=named_sets(places), built_in=BUILT_IN,
    )  # fmt: skip


@router.get("/api/data")
def files(request: Request) -> Response:
    """The files of data."""
    places = board_of(request).places
    return JSONResponse({"files": data_files(places), "named": named_sets(places), "built_in": BUILT_IN})


@router.post("/api/upload")
async def upload(request: Request, name: str) -> Response:
    """The body is the file. It is written beside its place first; one of the same name stays, this gets a number."""
    places = board_of(request).places
    wanted = safe_name(name.replace("\\", "/").rpartition("/")[2], "data")
    if os.path.splitext(wanted)[1].lower() not in DATA_SUFFIXES:
        raise OutsideError(f"{name[:100]!r} is no data file; data files end in {', '.join(DATA_SUFFIXES)}")
    partial = places.uploads / f".{secrets.token_hex(8)}.partial"
    try:
        written = 0
        with open(partial, "xb") as file:
            async for piece in request.stream():
                written += len(piece)
                if written > board_of(request).options.upload_bytes:
                    raise HTTPException(413, "the file is larger than the board takes; put it into a --data folder")
                await run_in_threadpool(file.write, piece)
        if not written:
            raise HTTPException(400, "the file is empty")
        final = wanted if wanted == _DATASET_INFO else free_name(places.uploads, wanted)
        os.replace(partial, child_of(places.uploads, final))
    except OSError as error:
        raise HTTPException(507, f"it could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return JSONResponse({"path": f"data/{final}", "bytes": written})


class DataRequest(BoardRequest):
    """A file, or a name of the built-in data, and the model whose tokens are counted."""

    path: str
    model: str = ""
    format: str = ""


@router.post("/api/data/look")
def look(request: Request, body: DataRequest) -> Response:
    """`lowrank data FILE`: rows, problems with their numbers, what carries loss."""
    board = board_of(request)
    arguments = ["data"]
    if body.path in BUILT_IN:
        arguments.append(body.path)
    else:
        arguments.append(board.places.shown(board.places.readable_data(body.path)))
    if body.model:
        if not body.model.startswith("lowrank/"):
            board.places.readable_model(body.model)
        arguments += ["--model", body.model]
    if body.format:
        arguments += ["--format", body.format]
    try:
        result = board.warm_worker.run([*arguments, "--json"], topic="data")
    except Superseded:
        return JSONResponse({"superseded": True})
    command = "lowrank " + " ".join(arguments)
    if result.error:
        return JSONResponse({"problem": texts_of(request).reply(result.error), "command": command})
    return JSONResponse({"report": _first(texts_of(request), result.content), "command": command})


def _first(texts: Texts, content: dict[str, Any]) -> dict[str, Any]:
    """What is lost and what else is odd are sentences, each with whether it is in the page's language."""
    report = (content.get("reports") or [{}])[0]
    losses = report.get("losses") or []
    others = [text for text in report.get("notices") or [] if text not in losses]
    translated = {
        name: [vars(texts.sentence(text)) for text in found]
        for name, found in (("losses", losses), ("notices", others))
    }
    return {**report, **translated}

"""Several runs in one plot, and the settings in which they differ."""

from __future__ import annotations

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from lowrank.board.page import answer_page, board_of
from lowrank.board.places import OutsideError
from lowrank.board.runs import RunEntry, differing

router = APIRouter()
_MOST = 8


@router.get("/compare")
def compare(request: Request, run: list[str] = Query(default=[])) -> Response:  # noqa: B008 (FastAPI's way)
    """The chosen runs side by side."""
    board = board_of(request)
    chosen: list[RunEntry] = []
    for name in run[:_MOST]:
        try:
            found = board.run(name)
        except OutsideError:
            continue
        if found is not None:
            chosen.append(found)
    return answer_page(
        request,
        "compare.html",
        place="compare",
        runs=board.runs(),
        chosen=chosen,
        names=[each.name for each in chosen],
        differences=differing({each.name: each.config for each in chosen}),
        most=_MOST,
    )

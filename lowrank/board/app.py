"""The board as an ASGI application."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from lowrank.board import form
from lowrank.board.guard import BoardGuard
from lowrank.board.page import answer_page, texts_of
from lowrank.board.routes import ROUTERS
from lowrank.board.sentences import in_chinese
from lowrank.board.state import Board
from lowrank.board.texts import LANGUAGES, Texts
from lowrank.errors import LowrankError

PREPARING = "prepare pages"
"""The thread that does so."""
_STATIC = Path(__file__).parent / "static"


def make_app(board: Board, *, token: str, hosts: Collection[str], port: int) -> FastAPI:
    """The pages of a board, behind its guard. Its queue works as long as the application does."""

    @asynccontextmanager
    async def lifetime(app: FastAPI) -> AsyncGenerator[None, None]:
        await run_in_threadpool(board.open)
        threading.Thread(target=_prepare, name=PREPARING, daemon=True).start()
        yield
        await run_in_threadpool(board.close)

    app = FastAPI(
        title="lowrank board",
        lifespan=lifetime,
        docs_url=None,
        redirect_slashes=False,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.board = board
    for router in ROUTERS:
        app.include_router(router)
    app.mount("/static", _Static(directory=_STATIC), name="static")
    app.add_exception_handler(LowrankError, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(
        BoardGuard,
        token=token,
        hosts=hosts,
        port=port,
        upload_bytes=board.options.upload_bytes,
        upload_seconds=board.options.upload_seconds,
    )
    return app


def _prepare() -> None:
    """What the first page would wait for, a quarter of a second: templates, texts, the schema of the settings."""
    for language in LANGUAGES:
        Texts(language)
    environment = Texts("en").environment
    for name in environment.list_templates():
        environment.get_template(name)
    form.fields()
    in_chinese("")


class _Static(StaticFiles):
    """Scripts and styles; asked for again each time, so that a new version is a new version at once."""

    def file_response(self, *args: object, **kwargs: object) -> Response:
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
        response.headers["Cache-Control"] = "no-cache"
        return response


async def _refused(request: Request, error: Exception) -> Response:
    return _error_response(request, 400, str(error))


async def _malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    detail = "; ".join(f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in error.errors())
    return _error_response(request, 422, detail)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error_response(request, error.status_code, str(error.detail))


def _error_response(request: Request, status: int, message: str) -> Response:
    message = texts_of(request).reply(message)
    if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
        return answer_page(request, "problem.html", status=status, message=message, code=status)
    return JSONResponse({"error": {"message": message}}, status)

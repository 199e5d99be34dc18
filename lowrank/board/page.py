"""A page or a part of one, in the language of whoever asks."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, Response
from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from lowrank.board.state import Board
from lowrank.board.texts import LANGUAGES, Texts

LANGUAGE_COOKIE = "lowrank_language"


def board_of(request: Request) -> Board:
    """The board this application is of."""
    return request.app.state.board


def texts_of(request: Request) -> Texts:
    """The texts in the language that was chosen, or that the browser asks for."""
    return texts_for(request.headers)


def texts_for(headers: Headers) -> Texts:
    """The same, where there is no request yet."""
    chosen = cookie_parser(headers.get("cookie", "")).get(LANGUAGE_COOKIE, "")
    return Texts(chosen) if chosen in LANGUAGES else Texts.for_header(headers.get("accept-language", ""))


def answer_page(request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
    """The template with the texts, in the frame all pages have."""
    texts = texts_of(request)
    content = {
        "t": texts,
        "language": texts.language,
        "languages": LANGUAGES,
        "path": request.url.path,
        "place": "",
        "script_texts": texts.for_scripts(),
        **values,
    }
    return HTMLResponse(texts.environment.get_template(template).render(content), status)

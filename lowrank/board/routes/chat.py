"""Try it: a conversation with the base and adapters side by side, answered by a `lowrank serve` child."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from lowrank.board.body import BoardRequest
from lowrank.board.last_line import last_lines, message_lines
from lowrank.board.page import answer_page, board_of
from lowrank.board.routes.runs import about
from lowrank.board.runs import checkpoints
from lowrank.board.state import Board
from lowrank.board.tasks import ERRORS, OUTPUT, Task

router = APIRouter()
_ADDRESS = re.compile(r"http://(?:127\.0\.0\.1|localhost|\[::1\]):(\d{2,5})")
_PICTURE = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+={0,2}\Z")
_IDLE_SECONDS = 900.0
_LAST_REQUEST: dict[str, float] = {}


@router.get("/runs/{name}/try")
def try_page(request: Request, name: str) -> Response:
    """The page of one run."""
    return answer_page(request, "try.html", place="runs", tab="try", **about(request, name))


class Open(BoardRequest):
    """What is loaded: the run's adapters (the best or the last), or those of a checkpoint."""

    which: str = "best"


@router.post("/api/runs/{name}/chat")
def open_chat(request: Request, name: str, body: Open) -> Response:
    """Have the run's base and adapters loaded; chats of other runs are closed, one device holds one."""
    board = board_of(request)
    run = board.run(name)
    if run is None:
        raise HTTPException(404, f"there is no run {name[:80]!r}")
    target = board.places.shown(run.folder)
    options = []
    if body.which == "last":
        options = ["--last"]
    elif body.which != "best":
        if body.which not in checkpoints(run.folder):
            raise HTTPException(404, "there is no such checkpoint")
        target += f"/checkpoints/{body.which}"
    arguments = board.arguments("serve", target, *options, "--port", "0", "--json")
    for task in _chats(board):
        if task.subject == name and list(task.arguments) == arguments:
            return JSONResponse({"task": task.id})
        board.queue.stop(task.id)
    task = board.queue.add("serve", arguments, subject=name)
    board.queue.move(task.id, -999)
    _LAST_REQUEST[task.id] = time.monotonic()
    return JSONResponse({"task": task.id})


@router.get("/api/chat/{task}")
def chat_state(request: Request, task: str) -> Response:
    """`waiting` (for whom), `loading`, `ready` with the models, or over."""
    board = board_of(request)
    found = _task(board, task)
    outcome = board.queue.outcome(found)
    port = _port(board, found)
    if outcome.state == "running":
        state = "ready" if port is not None else "loading"
    else:
        state = outcome.state
    blocked = [each.subject for each in board.queue.running() if each.id != task] if state == "waiting" else []
    lines = message_lines(board.queue.tasks.folder(task) / ERRORS, 1)
    return JSONResponse({"state": state, "message": outcome.message or " ".join(lines)[-300:], "behind": blocked})


@router.get("/api/chat/{task}/models")
async def list_models(request: Request, task: str) -> Response:
    """The names of the base and the adapters, and whether they are shown pictures."""
    board = board_of(request)
    async with _client(board, _task(board, task)) as client:
        answer = await client.get("/v1/models")
        names = [each["id"] for each in answer.json().get("data", [])]
        able = await client.post("/api/show", json={"model": names[0]}) if names else None
        supports_images = able is not None and "vision" in (able.json().get("capabilities") or ())
        return JSONResponse({"models": names, "supports_images": supports_images})


class _Part(BaseModel):
    """Of a question: text, or a picture as the page read it. No file is read and nothing is fetched for it."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: dict[Literal["url"], str] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> _Part:
        if (self.type == "text") == (self.text is None) or (self.type == "image_url") == (self.image_url is None):
            raise ValueError("a part of a question is a text or a picture")
        if self.image_url is not None and not _PICTURE.match(self.image_url.get("url", "")):
            raise ValueError("a picture comes within the question, as PNG, JPEG, WebP or GIF")
        return self


class _Turn(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str | list[_Part]


class ChatMessages(BoardRequest):
    """One question to one model, as OpenAI's API has it."""

    model: str
    messages: list[_Turn]
    temperature: float = Field(0.7, ge=0, le=5)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(512, ge=1, le=8192)


@router.post("/api/chat/{task}/say")
async def send(request: Request, task: str, body: ChatMessages) -> Response:
    """The answer as a stream of server-sent events, passed through as the server makes it."""
    board = board_of(request)
    found = _task(board, task)
    _LAST_REQUEST[task] = time.monotonic()
    content = {
        "model": body.model,
        "messages": [turn.model_dump(exclude_none=True) for turn in body.messages],
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_tokens": body.max_tokens,
        "stream": True,
    }
    client = _client(board, found)
    outgoing = client.build_request("POST", "/v1/chat/completions", json=content)
    answer = await client.send(outgoing, stream=True)
    if answer.status_code != 200:
        text = (await answer.aread()).decode("utf-8", "replace")
        await client.aclose()
        raise HTTPException(502, _refusal(text))

    async def pieces() -> AsyncIterator[bytes]:
        try:
            async for piece in answer.aiter_raw():
                yield piece
        finally:  # also when the person presses stop: the server then ends the answer
            await answer.aclose()
            await client.aclose()

    return StreamingResponse(pieces(), media_type="text/event-stream")


@router.post("/api/chat/{task}/close")
def close_chat(request: Request, task: str) -> Response:
    """Free the device."""
    board = board_of(request)
    board.queue.stop(_task(board, task).id)
    return JSONResponse({})


def close_idle_chats(board: Board) -> None:
    """Chats that nobody has used for a while, and any while others wait, give the device back."""
    waits = any(task.kind != "serve" for task in board.queue.waiting())
    for task in _chats(board):
        requested = _LAST_REQUEST.setdefault(task.id, time.monotonic())
        if time.monotonic() - requested > (_IDLE_SECONDS / 5 if waits else _IDLE_SECONDS):
            board.queue.stop(task.id)


def _refusal(text: str) -> str:
    """What the server said, out of the JSON in which it said it."""
    try:
        return str(json.loads(text)["error"]["message"])[:2000]
    except (ValueError, KeyError, TypeError):
        return text[:2000]


def _chats(board: Board) -> list[Task]:
    return [task for task in (*board.queue.running(), *board.queue.waiting()) if task.kind == "serve"]


def _task(board: Board, name: str) -> Task:
    task = board.queue.tasks.get(name)
    if task is None or task.kind != "serve":
        raise HTTPException(404, "there is no such chat")
    return task


def _port(board: Board, task: Task) -> int | None:
    """Where the child listens: the first address it printed."""
    for line in last_lines(board.queue.tasks.folder(task.id) / OUTPUT, 50):
        found = _ADDRESS.search(line)
        if found:
            return int(found[1])
    return None


def _client(board: Board, task: Task) -> Any:
    import httpx

    port = _port(board, task)
    if port is None or board.queue.outcome(task).over:
        raise HTTPException(409, "the model is not loaded")
    headers = {"Authorization": f"Bearer {board.serve_token}"}
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=600, trust_env=False)

"""Server-sent events: short messages on a stream that a browser takes up again by itself where it broke off."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

_LONGEST_SECONDS = 300.0
"""After this a stream ends and the browser asks again: proxies cut longer ones at moments of their own."""
_QUIET_SECONDS = 15.0
_OPEN = [0]


def event(name: str, content: Any, id: str = "") -> str:
    """One message."""
    data = json.dumps(content, ensure_ascii=True, allow_nan=False)
    return f"{f'id: {id}{chr(10)}' if id else ''}event: {name}\ndata: {data}\n\n"


async def events(request: Request, look: Callable[[], list[str]], *, every: float, most: int) -> Response:
    """A stream of what `look` finds every so many seconds. 503 where too many are open already."""
    if _OPEN[0] >= most:
        raise HTTPException(503, "too many open pages; this one asks again by itself", headers={"Retry-After": "5"})

    async def lines() -> AsyncIterator[str]:
        begun = last_sent = time.monotonic()
        yield "retry: 1000\n\n"
        while time.monotonic() - begun < _LONGEST_SECONDS and not await request.is_disconnected():
            for message in await asyncio.to_thread(look):
                yield message
                last_sent = time.monotonic()
            if time.monotonic() - last_sent > _QUIET_SECONDS:
                yield ": still here\n\n"
                last_sent = time.monotonic()
            await asyncio.sleep(every)

    _OPEN[0] += 1
    return _Counted(lines(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


class _Counted(StreamingResponse):
    """Open until it was sent, or its client left."""

    async def __call__(self, *asgi: Any) -> None:
        """Send it."""
        try:
            await super().__call__(*asgi)
        finally:
            _OPEN[0] -= 1

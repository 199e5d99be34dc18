"""Connections that ask for nothing hold no place: a time-out for headers, and room for whoever asks.

uvicorn closes a connection that is idle after an answer, but waits for ever for the first header, and refuses
everybody once there are too many. Here the header has a time-out, and where there are too many connections the ones
without a request make room: first those that never showed the token, of the address that has the most, the oldest
first.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

SCOPE_KEY = "lowrank.connection"
"""Where a request's ASGI scope has its connection."""


class Connections:
    """Those of a server that are open, the longest unused ones first. Used from the event loop's thread only."""

    def __init__(self, most: int, header_seconds: float) -> None:
        self.most = most
        self.header_seconds = header_seconds
        self._open: dict[Connection, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def protocol(self, **options: Any) -> Connection:
        """uvicorn's `http_protocol_class`."""
        return Connection(self, **options)

    def add(self, connection: Connection) -> None:
        """It was opened; another may have to go."""
        if len(self._open) >= self.most and (spare := self._spare()) is not None:
            self.discard(spare)
            spare.transport.abort()
        self._open[connection] = None

    def used(self, connection: Connection) -> None:
        """It asked, or was answered."""
        if connection in self._open:
            del self._open[connection]
            self._open[connection] = None

    def discard(self, connection: Connection) -> None:
        """It is closed."""
        self._open.pop(connection, None)

    def _spare(self) -> Connection | None:
        """Whom to close; None if all are in use: then `ConcurrencyLimiter` says no to what they ask."""
        idle = [each for each in self._open if not each.busy]
        strangers = [each for each in idle if not each.trusted]
        if not strangers:
            return next(iter(idle), None)
        peers = Counter(each.peer for each in strangers)
        crowd = max(peers, key=lambda peer: peers[peer])
        return next(each for each in strangers if each.peer == crowd)


class Connection(H11Protocol):
    """One of them. `trusted`: a request over it had the token (guard.py)."""

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self.trusted = False
        self._ours = connections
        self._deadline: asyncio.TimerHandle | None = None
        self._application: Any = self.app
        self.app = self._with_connection

    @property
    def peer(self) -> str:
        """The address it comes from."""
        return self.client[0] if self.client else ""

    @property
    def busy(self) -> bool:
        """A request is being answered."""
        cycle: Any = self.cycle  # None before the first request, whatever uvicorn's types say
        return cycle is not None and not cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Its first header has a time-out."""
        super().connection_made(transport)
        self._ours.add(self)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """A header that was begun has a time-out, whatever drips in."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """From here on uvicorn's own time-out for idle connections counts."""
        super().on_response_complete()
        self._ours.used(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """However it ended."""
        self._ours.discard(self)
        self._unwatch()
        super().connection_lost(exc)
        self.app = self._application  # or it would hold itself

    async def _with_connection(self, scope: Any, receive: Any, send: Any) -> None:
        await self._application({**scope, SCOPE_KEY: self}, receive, send)

    def _watch(self) -> None:
        if self.busy:
            self._unwatch()
            self._ours.used(self)
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self._ours.header_seconds, self._late)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        transport: Any = self.transport  # None before the connection is made
        if not self.busy and transport is not None:
            transport.abort()

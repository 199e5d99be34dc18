"""Runs the HTTP application on a socket until somebody stops it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import uvicorn

from lowrank.serve.address import listen
from lowrank.serve.api.app import make_app
from lowrank.serve.connections import Connections
from lowrank.serve.engine import ServeEngine
from lowrank.serve.limits import RequestLimits

_IDLE_SECONDS = 30
"""A connection without a request stays this long. With uvicorn's 5 a busy client's next request met a closed one."""


def run(
    engine: ServeEngine,
    *,
    host: str,
    port: int,
    token: str,
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
    limits: RequestLimits | None = None,
    on_listening: Callable[[int], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; then answers in progress have `limits.shutdown_seconds` to end.

    `port` 0 takes a free one; `on_listening` is called with it. Raises ConfigError if it is taken.
    """
    limits = limits or RequestLimits()
    listening = listen(host, port)
    names = {*hosts, host} - {"0.0.0.0", "::"}
    server = make_server(engine, token=token, hosts=names, origins=origins, limits=limits)
    try:
        if on_listening is not None:
            on_listening(listening.getsockname()[1])
        server.run(sockets=[listening])
    finally:
        listening.close()


def make_server(
    engine: ServeEngine, *, token: str, hosts: Collection[str], limits: RequestLimits, origins: Collection[str] = ()
) -> uvicorn.Server:
    """uvicorn with our application. It trusts no proxy's word about who is asking."""
    connections = Connections(min(limits.connections, _files() // 2), limits.header_seconds)
    config = uvicorn.Config(
        make_app(engine, token=token, hosts=hosts, origins=origins, limits=limits),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        http=cast(Any, connections.protocol),
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=limits.shutdown_seconds,
    )
    return uvicorn.Server(config)


def _files() -> int:
    """How many may be open; some of them are connections."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 4096
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if soft == resource.RLIM_INFINITY else max(128, soft)

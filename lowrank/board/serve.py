"""The board on a socket, until somebody stops it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Any, cast

import uvicorn
from filelock import FileLock, Timeout

from lowrank.board.app import make_app
from lowrank.board.places import Places
from lowrank.board.routes.chat import close_idle_chats
from lowrank.board.state import Board, Options, kept_token
from lowrank.errors import ConfigError, OutputError
from lowrank.serve.address import listen
from lowrank.serve.connections import Connections

_MOST_CONNECTIONS = 400
"""Beyond, those make room that ask for nothing."""


def run(
    places: Places,
    options: Options,
    *,
    host: str,
    port: int,
    token: str | None,
    hosts: Collection[str],
    announce: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM. `announce` is called with the address to open, which carries the token."""
    places.make()
    lock = FileLock(places.own / "lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(f"a board is open on {places.folder} already; open its page, or stop it first") from None
    try:
        listening = listen(host, port)
        try:
            number = listening.getsockname()[1]
            token = token or kept_token(places)
            shown = f"[{host}]" if ":" in host else {"0.0.0.0": "127.0.0.1"}.get(host, host)
            board = Board(places, options)
            server = make_server(board, token=token, hosts={*hosts, host} - {"0.0.0.0", "::"}, port=number)
            listening.listen(1024)  # who opens the address at once waits, and is not refused
            announce(f"http://{shown}:{number}/?token={token}")
            server.run(sockets=[listening])
        except OSError as error:
            raise ConfigError(f"cannot serve on {host} port {port}: {error}") from error
        finally:
            listening.close()
    finally:
        lock.release()


def make_server(board: Board, *, token: str, hosts: Collection[str], port: int) -> uvicorn.Server:
    """uvicorn with the board. It trusts no proxy's word about who is asking."""
    config = uvicorn.Config(
        make_app(board, token=token, hosts=hosts, port=port),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        http=cast(Any, Connections(_MOST_CONNECTIONS, board.options.header_seconds).protocol),
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
    )
    server = uvicorn.Server(config)
    threading.Thread(target=_tidy, args=(board, server), name="tidy", daemon=True).start()
    return server


def _tidy(board: Board, server: uvicorn.Server) -> None:
    """Give back what nobody uses any more: idle conversations, the memory of the warm worker."""
    waiting = threading.Event()
    while not server.should_exit:
        waiting.wait(5)
        if server.started:
            close_idle_chats(board)
            board.warm_worker.close_if_idle()

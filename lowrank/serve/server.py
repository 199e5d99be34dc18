"""The application on a socket, until somebody stops it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Collection

import uvicorn

from lowrank.errors import ConfigError
from lowrank.serve.app import make_app
from lowrank.serve.engine import Engine
from lowrank.serve.limits import Limits

_CONNECTIONS_PER_ANSWER = 2
_IDLE_SECONDS = 30
"""A connection without a request stays this long. With uvicorn's 5 a busy client's next request met a closed one."""


def check_host(host: str, token: str | None) -> None:
    """ConfigError for an address others can reach, unless a token was chosen for it."""
    if not is_loopback(host) and not token:
        raise ConfigError(
            f"--host {host} lets other machines in: choose a token for it with --token or LOWRANK_TOKEN, or leave "
            "--host out to serve this machine only"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def run(
    engine: Engine,
    *,
    host: str,
    port: int,
    token: str,
    hosts: Collection[str] = (),
    limits: Limits | None = None,
    on_listening: Callable[[int], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; then answers in the making have `limits.shutdown_seconds` to end.

    `port` 0 takes a free one; `on_listening` hears which. Raises ConfigError if it is taken.
    """
    limits = limits or Limits()
    listening = _listen(host, port)
    names = {*hosts, host} - {"0.0.0.0", "::"}
    server = make_server(engine, token=token, hosts=names, limits=limits)
    try:
        if on_listening is not None:
            on_listening(listening.getsockname()[1])
        server.run(sockets=[listening])
    finally:
        listening.close()


def make_server(engine: Engine, *, token: str, hosts: Collection[str], limits: Limits) -> uvicorn.Server:
    """uvicorn with our application. It trusts no proxy's word about who is asking."""
    config = uvicorn.Config(
        make_app(engine, token=token, hosts=hosts, limits=limits),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=_CONNECTIONS_PER_ANSWER * (limits.answers_at_once + limits.waiting) + 64,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=limits.shutdown_seconds,
    )
    return uvicorn.Server(config)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host.strip("[]"), port))
    except OSError as error:
        raise ConfigError(f"cannot serve on {host} port {port}: {error}; choose another with --port") from error
    return listening

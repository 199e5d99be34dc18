"""Where a server listens, and who can reach it there. Imports nothing heavy: the board uses it too."""

from __future__ import annotations

import importlib.util
import ipaddress
import socket

from lowrank.errors import ConfigError


def check_installed(what: str, extra: str) -> None:
    """ConfigError if the packages of a web server are not there. `what` needs them, our `extra` brings them."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{what} needs {' and '.join(missing)}: pip install 'lowrank-llm[{extra}]'")


def url_of(host: str, port: int) -> str:
    """`http://127.0.0.1:8000`; an IPv6 address stands in brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


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


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, `port` 0 to a free one. ConfigError if it is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # asyncio sets TCP_NODELAY only where the protocol is named; without it every answer on a connection that is
        # kept open waits 40 ms for the client's delayed acknowledgment of the headers
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host.strip("[]"), port))
    except OSError as error:
        raise ConfigError(f"cannot serve on {host} port {port}: {error}; choose another with --port") from error
    return listening

"""Access middleware: authentication and request limits, before any route is looked at."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.connections import SCOPE_KEY
from lowrank.serve.limits import RequestLimits

OPEN_PATHS = frozenset({"/health"})
"""What needs no token: it says nothing but that the server is there."""


class AccessMiddleware:
    """ASGI middleware: Host header, bearer token, size and time of the body.

    A web page can point a DNS name of its own at 127.0.0.1 and have its visitors' browsers ask us; then the Host
    header has that name. So only numbers, `localhost` and the names given are let in; a number cannot be rebound.
    """

    def __init__(self, app: Any, *, token: str, hosts: Collection[str], limits: RequestLimits) -> None:
        self.app = app
        self.limits = limits
        self._token = token.encode()
        self._hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request; whatever is no HTTP passes (start and end of the server) or is closed."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(scope["path"], headers)
        except ApiError as refusal:
            response = JSONResponse(refusal.body(scope["path"]), refusal.status, headers=refusal.headers)
            await response(scope, receive, send)
            return
        connection = scope.get(SCOPE_KEY)
        if connection is not None and scope["path"] not in OPEN_PATHS:
            connection.trusted = True
        await self.app(scope, BoundedBody(receive, self.limits), send)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if not is_our_host(host, self._hosts):
            message = f"the Host header {host[:100]!r} is no name of this server; start it with --allow-host NAME"
            raise ApiError(403, message, code="unknown_host")
        if path not in OPEN_PATHS:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self._token)
            if scheme.lower() != "bearer" or not right:
                message = (
                    "no or a wrong token; send `Authorization: Bearer TOKEN`: what --token or LOWRANK_TOKEN gave the "
                    "server, or what it printed"
                )
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 20 or int(length) > self.limits.body_bytes:
            raise ApiError(413, _too_large(self.limits), code="request_too_large")


def is_our_host(header: str, hosts: Collection[str]) -> bool:
    """Whether a Host header is a number or one of `hosts`, which are in lower case; with or without a port."""
    name = header.rpartition(":")[0] if not header.endswith("]") and ":" in header else header
    if name.strip("[]").lower() in hosts:
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


class BoundedBody:
    """ASGI's `receive` that refuses a body which is too large or comes too slowly.

    The framework passes HTTPException on from reading a body, and nothing else.
    """

    def __init__(self, receive: Any, limits: RequestLimits) -> None:
        self._receive, self._limits = receive, limits
        self._deadline = time.monotonic() + limits.body_seconds
        self._bytes = 0
        self._complete = False

    async def __call__(self) -> Any:
        if self._complete:  # what may come now is the client's leaving
            return await self._receive()
        left = self._deadline - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, left))
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the body took more than {self._limits.body_seconds:g} seconds") from None
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._limits.body_bytes:
            raise HTTPException(413, _too_large(self._limits))
        self._complete = not message.get("more_body", False)
        return message


def _too_large(limits: RequestLimits) -> str:
    return f"the request is larger than {limits.body_bytes} bytes, the most this server reads"

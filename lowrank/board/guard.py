"""Authentication and request limits of the board, checked before any route.

The address the board prints has its token. Whoever opens it gets a cookie that no script can read and no other site's
request carries, and the token leaves the address. Every change is a POST that our own page sent: a page of another
site could make a browser send one, but not with our `Origin`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import urllib.parse
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, Response

from lowrank.board.page import texts_for
from lowrank.serve.api.middleware import BoundedBody, is_our_host
from lowrank.serve.connections import SCOPE_KEY
from lowrank.serve.limits import RequestLimits

OPEN_PATHS = frozenset({"/health"})
"""What needs no token: it says nothing but that the board is there."""
UPLOAD_PATH = "/api/upload"
_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "img-src 'self' blob: data:"
)
_YEAR = 365 * 86400
SMALL = RequestLimits(body_bytes=4 << 20, body_seconds=30.0)
_WITH_PICTURES = RequestLimits(body_seconds=120.0).for_pictures()
"""What the server behind a conversation takes."""
_MESSAGES_PATH = re.compile(r"/api/chat/[^/]+/say")


class BoardGuard:
    """ASGI middleware: Host header, token or cookie, origin of changes, size and time of bodies, headers of answers."""

    def __init__(
        self, app: Any, *, token: str, hosts: Collection[str], port: int, upload_bytes: int, upload_seconds: float
    ) -> None:
        self.app = app
        self.name = f"lowrank_board_{port}"  # browsers share cookies among the ports of a host
        self._token = token.encode()
        self._cookie = hmac.new(self._token, b"lowrank board", hashlib.sha256).hexdigest()
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        self._large = RequestLimits(body_bytes=upload_bytes, body_seconds=upload_seconds)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request; whatever is no HTTP passes (start and end of the server) or is closed."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limits = self._limits(scope["path"])
        refusal = self._check(scope, headers, limits)

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._add_security_headers(MutableHeaders(scope=message))
            await send(message)

        if refusal is not None:
            await refusal(scope, receive, send_guarded)
            return
        connection = scope.get(SCOPE_KEY)
        if connection is not None and scope["path"] not in OPEN_PATHS:
            connection.trusted = True
        await self.app(scope, BoundedBody(receive, limits), send_guarded)

    def _limits(self, path: str) -> RequestLimits:
        if path == UPLOAD_PATH:
            return self._large
        return _WITH_PICTURES if _MESSAGES_PATH.fullmatch(path) else SMALL

    def _check(self, scope: Any, headers: Headers, limits: RequestLimits) -> Response | None:
        host = headers.get("host", "")
        if not is_our_host(host, self._hosts):
            return _error_response(
                headers,
                403,
                f"the Host header {host[:100]!r} is no name of this board; start it with --allow-host NAME",
            )
        if scope["path"] in OPEN_PATHS:
            return None
        given = urllib.parse.parse_qs(scope["query_string"].decode("latin-1")).get("token")
        if given and scope["method"] == "GET" and hmac.compare_digest(given[0].encode(), self._token):
            return self._welcome(scope)
        if not self._has_cookie(headers):
            return self._request_token(headers)
        if scope["method"] not in ("GET", "HEAD"):
            origin = urllib.parse.urlsplit(headers.get("origin", ""))
            if origin.scheme not in ("http", "https") or origin.netloc != host:
                return _error_response(headers, 403, "a change must come from the board's own page")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limits.body_bytes:
            return _error_response(headers, 413, f"more than {limits.body_bytes} bytes, the most the board takes here")
        return None

    def _has_cookie(self, headers: Headers) -> bool:
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(self.name)
        except CookieError:
            return False
        return morsel is not None and hmac.compare_digest(morsel.value.encode(), self._cookie.encode())

    def _welcome(self, scope: Any) -> Response:
        """The cookie, and a page that goes on without the token in its address.

        Not a redirect: after a click in a mail a redirect would still be the other site's request, without the cookie.
        """
        path = scope["path"] if scope["path"].startswith("/") and not scope["path"].startswith("//") else "/"
        safe = urllib.parse.quote(path, safe="/")
        response = HTMLResponse(
            f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>lowrank</title>'
            f'<link rel="icon" href="/static/icon.svg">'
            f'<meta http-equiv="refresh" content="0;url={safe}"><p><a href="{safe}">lowrank</a></p></html>'
        )
        response.set_cookie(self.name, self._cookie, max_age=_YEAR, httponly=True, samesite="strict", path="/")
        return response

    def _request_token(self, headers: Headers) -> Response:
        if "text/html" not in headers.get("accept", ""):
            return _error_response(headers, 401, "no or a wrong token; open the address that `lowrank board` printed")
        texts = texts_for(headers)
        page = texts.environment.get_template("door.html").render(t=texts, language=texts.language)
        return HTMLResponse(page, 401)

    def _add_security_headers(self, headers: MutableHeaders) -> None:
        headers.setdefault("Content-Security-Policy", _POLICY)
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "no-referrer"
        headers["X-Frame-Options"] = "DENY"
        headers["Cross-Origin-Opener-Policy"] = "same-origin"
        headers["Cross-Origin-Resource-Policy"] = "same-origin"
        headers.setdefault("Cache-Control", "no-store")


def _error_response(headers: Headers, status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": texts_for(headers).reply(message)}}, status)

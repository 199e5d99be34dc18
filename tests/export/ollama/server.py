"""The part of Ollama's documented HTTP API that a deployment uses: digests, order, names, fields are checked."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_FIELDS = {
    "model",
    "from",
    "files",
    "adapters",
    "template",
    "license",
    "system",
    "parameters",
    "messages",
    "stream",
    "quantize",
}
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*(:[\w.-]+)?")


class Server(ThreadingHTTPServer):
    """`blobs`, `models` and every request, in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs: dict[str, bytes] = {}
        self.models: dict[str, dict[str, Any]] = {"there:latest": {}}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Answers as docs/api.md says."""

    server: Server

    def log_message(self, *what: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.server.requests.append(f"HEAD {self.path}")
        self.send_response(200 if self.path.removeprefix("/api/blobs/") in self.server.blobs else 404)
        self.end_headers()

    def do_POST(self) -> None:
        self.server.requests.append(f"POST {self.path}")
        body = self._body()
        if self.path.startswith("/api/blobs/"):
            digest = self.path.removeprefix("/api/blobs/")
            if digest != f"sha256:{hashlib.sha256(body).hexdigest()}":
                return self._answer(400, {"error": "digest mismatch, file must be downloaded again"})
            self.server.blobs[digest] = body
            return self._answer(201)
        return (self._create if self.path == "/api/create" else self._chat)(json.loads(body))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _create(self, body: dict[str, Any]) -> None:
        error = self._wrong(body)
        if error:
            return self._answer(400, {"error": error})
        self.server.models[_tagged(body["model"])] = body
        states = ["parsing GGUF", *(["quantizing F16 model to Q4_K_M"] if "quantize" in body else []), "success"]
        return self._answer(200, *({"status": state} for state in states))

    def _wrong(self, body: dict[str, Any]) -> str | None:
        unknown = body.keys() - _FIELDS
        if unknown:
            return f"unknown fields {sorted(unknown)}"
        if not _NAME.fullmatch(body.get("model", "")):
            return "invalid model name"
        if ("from" in body) == ("files" in body):
            return "neither 'from' or 'files' was specified" if "from" not in body else "both 'from' and 'files'"
        if "from" in body and _tagged(body["from"]) not in self.server.models:
            return f"model '{body['from']}' not found"
        for name, digest in {**body.get("files", {}), **body.get("adapters", {})}.items():
            if name.startswith(("/", "~")) or ".." in name:
                return f"invalid file name {name}"
            if digest not in self.server.blobs:
                return f"blob {digest} not found"
            if not self.server.blobs[digest].startswith(b"GGUF"):
                return "unsupported content type"
        if "quantize" in body and body["quantize"] not in ("q8_0", "q4_K_M", "q4_K_S"):
            return f"unsupported quantization type {body['quantize']}"
        stop = body.get("parameters", {}).get("stop", [])
        return None if isinstance(stop, list) else 'option "stop" must be of type array'

    def _chat(self, body: dict[str, Any]) -> None:
        if _tagged(body["model"]) not in self.server.models:
            return self._answer(404, {"error": f"model '{body['model']}' not found"})
        described = body["messages"][-1]["content"]
        return self._answer(200, {"model": body["model"], "created_at": "2026-01-01T00:00:00Z", "done": True,
                                  "message": {"role": "assistant", "content": f"you said {described}"}})  # fmt: skip

    def _answer(self, code: int, *lines: dict[str, Any]) -> None:
        body = "".join(json.dumps(line) + "\n" for line in lines).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _tagged(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


@contextmanager
def running() -> Iterator[Server]:
    """On a free port of this machine, until the block ends."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A stand-in of the Hugging Face hub on this machine, for what is uploaded."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP API that an upload uses; refuses what is out of order, and who is not `hf_secret`."""

    repositories: dict[str, dict[str, bytes]]
    private: dict[str, bool]
    messages: dict[str, str]
    """Of the last commit, by repository."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Authorization"] != "Bearer hf_secret":
            return self.answer(401, {"error": "who are you"})
        if self.path == "/api/repos/create":
            requested = json.loads(body)
            name = f"{requested.get('organization') or 'me'}/{requested['name']}"
            self.repositories.setdefault(name, {})
            self.private[name] = requested.get("visibility") == "private" or requested.get("private")
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            card = json.loads(body)["content"]
            assert card.startswith("---\n")
            return self.answer(200, {"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if name not in self.repositories:
            return self.answer(404, {"error": "no such repository"})
        if "/preupload/" in self.path:
            files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for each in json.loads(body)["files"]]  # fmt: skip
            return self.answer(200, {"files": files})
        assert "/commit/" in self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.messages[name] = line["value"]["summary"]
            if line["key"] == "file":
                self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer(
            200,
            {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"http://{self.headers['Host']}/{name}/commit/{'0' * 40}",
            },
        )

    def do_GET(self) -> None:
        self.answer(200, {"id": "me/it", "sha": "0" * 40, "siblings": []})

    def answer(self, code: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@contextmanager
def hub_stand_in() -> Iterator[tuple[Any, str]]:
    """(its class, which holds what was uploaded; its address), while the block runs."""
    kind = type("OneHub", (Hub,), {"repositories": {}, "private": {}, "messages": {}})
    server = HTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield kind, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

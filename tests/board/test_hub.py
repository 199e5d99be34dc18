"""What a base is, by its name: in a folder, in the hub's cache, at the hub; and who cannot tell says why."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from lowrank.board.hub import about_hub_model
from tests.board.running import board_on

MODEL = {
    "id": "org/chat",
    "config": {"model_type": "qwen2", "tokenizer_config": {"chat_template": "{{ messages }}"}},
    "siblings": [
        {"rfilename": "config.json", "size": 700},
        {"rfilename": "model-00001-of-00002.safetensors", "size": 600},
        {"rfilename": "model-00002-of-00002.safetensors", "size": 400},
        {"rfilename": "original/consolidated.safetensors", "size": 1000},
    ],
}
"""As the hub's API answers (huggingface.co/api/models/NAME?blobs=true), in what is read of it."""
ANSWERS: dict[str, tuple[int, Any]] = {
    "/api/models/org/chat?blobs=true": (200, MODEL),
    "/api/models/org/plain?blobs=true": (200, {**MODEL, "config": {"model_type": "llama"}}),
    "/api/models/org/gguf?blobs=true": (200, {"config": None, "siblings": [{"rfilename": "x.gguf"}]}),
    "/api/models/org/gated?blobs=true": (403, {}),
    "/api/models/org/list?blobs=true": (200, [1]),
    "/api/models/org/renamed?blobs=true": (307, "/api/models/org/chat?blobs=true"),
    "/api/models/org/elsewhere?blobs=true": (307, "http://127.0.0.2:1/x"),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A stand-in of the hub; the keys that were sent to it."""
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("Authorization", ""))
            code, content = ANSWERS.get(self.path, (404, {}))
            self.send_response(code)
            if code == 307:
                self.send_header("Location", content)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield keys
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/chat", {"kind": "qwen2", "bytes": 1000, "chat": True, "where": "hub"}),
        ("org/renamed", {"kind": "qwen2", "bytes": 1000, "chat": True, "where": "hub"}),
        ("org/plain", {"kind": "llama", "bytes": 1000, "chat": False, "where": "hub"}),
        ("org/gguf", {"problem": "no_model", "where": "hub"}),
        ("org/gated", {"problem": "closed"}),
        ("org/nothing", {"problem": "unknown"}),
        ("org/list", {"problem": "unreachable"}),
        ("org/elsewhere", {"problem": "unreachable"}),
    ],
)
def test_what_the_hub_says(hub: list[str], name: str, expected: dict[str, Any]) -> None:
    assert about_hub_model(name) == expected
    assert set(hub) == {"Bearer hf_secret"}


def test_the_cache_is_looked_at_first_and_offline_nobody_is_asked(
    hub: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "models--org--chat"
    snapshot = folder / "snapshots" / "abcdef"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abcdef", encoding="utf-8")
    (snapshot / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    assert about_hub_model("org/chat")["where"] == "hub", "its weights are not there yet"
    (snapshot / "model.safetensors").write_bytes(b"x" * 10)
    requested = len(hub)
    assert about_hub_model("org/chat") == {"kind": "qwen2", "bytes": 10, "chat": False, "where": "cache"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert about_hub_model("org/other") == {"problem": "offline"}
    assert len(hub) == requested


def test_the_page_asks_for_folders_and_names_alone(hub: list[str], tmp_path: Path) -> None:
    with board_on(tmp_path / "board") as running, running.client() as http:
        about = lambda path: http.get("/api/models/about", params={"path": path})  # noqa: E731
        assert about("lowrank/tiny").json()["kind"] == "llama"
        assert about("org/chat").json()["where"] == "hub"
        (running.board.places.folder / "org" / "mine").mkdir(parents=True)
        assert about("org/mine").json() == {"problem": "no_model"}
        for path in ("/etc", "../x", "org/../../x"):
            assert about(path).status_code == 400
        for path in ("x", "a/b/c", "org/a b", "org/..x"):
            assert about(path).json() == {"problem": "no_model"}
    assert len(hub) == 1

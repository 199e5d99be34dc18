"""Downloads from a hub that stands on the loopback: the real client of it, through `HF_ENDPOINT`, as a person's."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch

from lowrank.adapters.variants import lora
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import save_adapter
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca
from tests.checkpoints.test_peft_layout import random_adapter
from tests.export.sources import load

pytestmark = pytest.mark.slow  # each command is a process that imports everything
COMMIT = "c" * 40


@dataclass
class Hub:
    """Repositories as folders. `requests`: every path that was asked for; `broken`: files that end in the midst."""

    root: Path
    requests: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    url: str = ""

    def run(self, home: Path, *arguments: str) -> tuple[int, str]:
        """`lowrank` as it is typed by somebody whose hub this is."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1"}
        ended = subprocess.run(
            [sys.executable, "-m", "lowrank", *arguments],
            env=environment,
            cwd=home,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=280,
        )
        return ended.returncode, ended.stdout + ended.stderr


class Answers(BaseHTTPRequestHandler):
    """The part of the hub's HTTP API that downloads use."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            return self.about("/".join(parts[2:4]), parts[4:5])
        if len(parts) >= 5 and parts[2] == "resolve":
            return self.file("/".join(parts[:2]), "/".join(parts[4:]))
        return self.missing("EntryNotFound")

    def about(self, name: str, kind: list[str]) -> None:
        folder = self.hub.root / name
        if not folder.is_dir():
            return self.missing("RepoNotFound")
        files = [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": etag(path), "rfilename": path.name}
            for path in sorted(folder.iterdir())
        ]
        if kind == ["tree"]:
            return self.send(200, json.dumps(files).encode(), {"Content-Type": "application/json"})
        about = {"id": name, "modelId": name, "sha": COMMIT, "siblings": files, "tags": [], "private": False}
        return self.send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def file(self, name: str, file: str) -> None:
        path = self.hub.root / name / file
        if not (self.hub.root / name).is_dir():
            return self.missing("RepoNotFound")
        if not path.is_file():
            return self.missing("EntryNotFound")
        content, tag = path.read_bytes(), etag(path)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return self.send(200, content, headers, cut=f"{name}/{file}" in self.hub.broken)

    def missing(self, code: str) -> None:
        self.send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def send(self, status: int, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut and self.command == "GET":
            self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Silent."""


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    root = tmp_path / "hub"
    (root / "me").mkdir(parents=True)
    save_checkpoint_folder(root / "me" / "base")
    model = load(root / "me" / "base", torch.float32)
    save_adapter(root / "me" / "tuned", random_adapter(model, lora.LoraConfig(rank=2)), describe_base(model, "me/base"))
    found = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Answers,), {"hub": found}))
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_adapter_and_its_base_come_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    arguments = ("chat", "me/tuned", "--prompt", "Hi", "--max-new-tokens", "3", "--chat-template", "alpaca")
    code, output = hub.run(tmp_path, *arguments)
    assert code == 0, output
    got = [each.removeprefix("GET ") for each in hub.requests if each.startswith("GET ") and "/resolve/" in each]
    assert any(each.startswith("me/tuned") and each.endswith("adapter_model.safetensors") for each in got)
    assert any(each.startswith("me/base") and each.endswith("safetensors") for each in got)
    assert not any(each.endswith((".bin", ".pt", ".pkl")) for each in got)
    hub.requests.clear()
    assert hub.run(tmp_path, *arguments)[0] == 0
    assert not [each for each in hub.requests if each.startswith("GET ") and each.endswith("safetensors")], (
        "it is there"
    )


def test_training_on_a_base_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    rows = write_alpaca(tmp_path / "rows.json", 4)
    arguments = [
        "model.path=me/base",
        f"data.train={rows}",
        "data.chat_template=alpaca",
        "max_steps=1",
        "output_dir=run",
    ]
    (tmp_path / "run.yaml").write_text("model: {path: none, dtype: float32, device: cpu}\n", "utf-8")
    code, output = hub.run(tmp_path, "train", "run.yaml", *arguments)
    assert code == 0, output
    saved = next((tmp_path / "run").rglob("adapter_config.json"))
    assert json.loads(saved.read_text("utf-8"))["base_model_name_or_path"] == "me/base"


def test_what_the_hub_has_not_or_breaks_off_is_said(hub: Hub, tmp_path: Path) -> None:
    code, output = hub.run(tmp_path, "chat", "me/nothing", "--prompt", "Hi")
    assert (code, "Traceback" in output) == (4, False), output
    assert "me/nothing" in output
    hub.broken.add("me/base/model.safetensors")
    code, output = hub.run(tmp_path, "chat", "me/base", "--prompt", "Hi", "--chat-template", "alpaca")
    assert (code, "Traceback" in output) == (4, False), output
    assert "the network broke off" in output or "me/base" in output

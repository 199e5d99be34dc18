"""`lowrank export` as typed, and uploads to a hub that stands in the test."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from lowrank.adapters.variants import lora
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import save_adapter
from lowrank.cli.export_settings import read_combination, read_targets
from lowrank.cli.main import main
from lowrank.errors import ConfigError
from tests.checkpoint_folder import save_checkpoint_folder
from tests.checkpoints.test_peft_layout import random_adapter
from tests.command_line import lowrank
from tests.export.sources import load


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    model = load(save_checkpoint_folder(world / "model"), torch.float32)
    save_adapter(world / "mine", random_adapter(model, lora.Config(rank=2)), describe_base(model, str(world / "model")))
    return world / "mine"


def call(*words: Any) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return int(left.value.code or 0)


def test_export_prints_and_leaves_by_its_exit_code(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("export", adapter, "--to", "merged", "-o", tmp_path / "out", "max_shard_size=30KB") == 0
    shown = capsys.readouterr().out
    assert "same model" in shown
    assert "general questions" in shown
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1

    from lowrank.export.targets import merged

    strict = {dtype: type(allowed)(0.0, 1.0, 0.0) for dtype, allowed in merged.TOLERANCES.items()}
    monkeypatch.setattr(merged, "TOLERANCES", strict)
    words = ("export", adapter, "--dtype", "float16", "-o", tmp_path / "half")
    assert call(*words) == 6
    output = capsys.readouterr()
    assert "differs" in output.out
    assert "by more than it may" in output.err
    assert call(*words[:-1], tmp_path / "json", "--json") == 6
    result = json.loads(capsys.readouterr().out)
    assert result["targets"]["merged"]["passed"] is False


def test_dry_run_and_the_place_by_default(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    words = ("export", adapter, "--to", "peft,merged", "--dry-run", "--push", "me/it", "--json")
    assert call(*words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["targets"]["merged"]["path"] == f"{adapter}-export/mine/merged"
    assert result["targets"]["merged"]["disk_bytes"] > 50_000
    assert [each["repository"] for each in result["pushed"]] == ["me/it-peft", "me/it-merged"]
    assert not Path(f"{adapter}-export").exists()


def test_settings_of_targets() -> None:
    one, other = read_targets("peft,merged", ["merged.max_shard_size=2GB"], {"dtype": "float16"})
    assert (one.model_dump(), other.model_dump()) == (
        {"type": "peft", "dtype": "float16"},
        {"type": "merged", "dtype": "float16", "max_shard_size": "2GB"},
    )
    with pytest.raises(ConfigError) as refused:
        read_targets("peft,mergd,peft", ["dtype=float16", "nothing"], {"types": "q8_0"})
    text = str(refused.value)
    assert "--to mergd: there is no such target; did you mean 'merged'?" in text
    assert "--to peft: named twice" in text
    assert "say whose: peft.dtype=..." in text
    assert "'nothing': expected KEY=VALUE" in text
    assert "--type q8_0: peft, mergd, peft has no such setting" in text
    with pytest.raises(
        ConfigError, match=r"merged\.dtype: Input should be .*got 'int3'(.|\n)*merged\.max_shard_size: expected a size"
    ):
        read_targets("merged", ["dtype=int3", "max_shard_size=much"], {})
    assert read_combination(None, None, 0.5) is None
    with pytest.raises(ConfigError, match="--weights a,b: expected numbers"):
        read_combination("add", "a,b", 0.5)
    with pytest.raises(ConfigError, match="--combine: Input should be"):
        read_combination("mix", None, 0.5)


# ---- the hub ------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP API that an upload uses; refuses what is out of order."""

    repositories: dict[str, dict[str, bytes]]
    private: dict[str, bool]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Authorization"] != "Bearer hf_secret":
            return self.answer(401, {"error": "who are you"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repositories[name], self.private[name] = (
                {},
                asked.get("visibility") == "private" or asked.get("private"),
            )
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            card = json.loads(body)["content"]
            assert card.startswith("---\nlibrary_name: peft\n")
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


@pytest.fixture
def hub() -> Iterator[Any]:
    kind = type("OneHub", (Hub,), {"repositories": {}, "private": {}})
    server = HTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield kind, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def push(adapter: Path, out: Path, endpoint: str, token: str) -> CompletedProcess[str]:
    words = ["export", str(adapter), "--to", "peft", "-o", str(out), "--no-verify", "--push", "me/it"]
    return lowrank(*words, HF_ENDPOINT=endpoint, HF_TOKEN=token, HF_HUB_DISABLE_TELEMETRY="1")


@pytest.mark.slow
def test_what_was_written_is_uploaded(adapter: Path, tmp_path: Path, hub: Any) -> None:
    kind, endpoint = hub
    done = push(adapter, tmp_path / "out", endpoint, "hf_secret")
    assert done.returncode == 0, done.stdout + done.stderr
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert kind.repositories == {"me/it": written}
    assert kind.private == {"me/it": True}
    assert f"uploaded to {endpoint}/me/it" in done.stdout
    assert "hf_secret" not in done.stdout + done.stderr
    refused = push(adapter, tmp_path / "again", endpoint, "hf_wrong")
    assert refused.returncode == 5
    assert "the hub refuses the upload" in refused.stderr
    assert "hf_wrong" not in refused.stdout + refused.stderr
    assert (tmp_path / "again" / "adapter_model.safetensors").is_file()


def test_pushing_needs_a_token_and_a_name(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    assert call("export", adapter, "-o", tmp_path / "out", "--push", "me/it") == 2
    assert "set HF_TOKEN" in capsys.readouterr().err
    assert call("export", adapter, "-o", tmp_path / "out", "--push", "it") == 2
    assert "expected owner/name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

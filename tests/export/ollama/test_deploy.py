"""From an adapter to a model of an Ollama server: export, Modelfile, upload, create, one answer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lowrank.cli.main import main
from lowrank.errors import ConfigError, ModelError
from lowrank.export.publish.ollama_server import server_url
from lowrank.models.loading.pretrained import TINY, locate
from tests.export.ollama.modelfile_reader import read
from tests.export.ollama.server import Server, running

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
pytest.importorskip("ollama")


def call(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of the shipped base, in PEFT's layout."""
    folder = tmp_path_factory.mktemp("adapter") / "taught"
    model = transformers.AutoModelForCausalLM.from_pretrained(locate(TINY), dtype=torch.float32)
    torch.manual_seed(0)
    both = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, parameter in both.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    both.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": TINY}))
    return folder


@pytest.fixture(scope="module")
def folder(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "ollama"
    arguments = ("--type", "f16", "-o", out, "system=Be brief.", "template=true")
    assert call("export", adapter, "--to", "ollama", *arguments) == 0
    return out


@pytest.fixture
def server() -> Any:
    with running() as server:
        yield server


def test_the_export(folder: Path) -> None:
    described = read((folder / "Modelfile").read_text())
    names = [name for name, _ in described]
    assert described[:4] == [("from", "./taught-F16.gguf"), ("num_ctx", "1024"), ("stop", "<|im_end|>"), described[3]]
    assert names[3:] == ["template", "system"]
    assert dict(described)["system"] == "Be brief."
    report = json.loads((folder / "export.json").read_text())
    assert report["passed"]
    assert report["comparisons"][0]["name"] == "taught-F16.gguf"


def test_deployed(folder: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("deploy", "ollama", "me/taught:v1", folder, "--host", server.url.removeprefix("http://"), "--json")
    assert call(*arguments, "--prompt", "你好") == 0
    reported = json.loads(capsys.readouterr().out)
    assert reported["answer"] == "you said 你好"
    digest = f"sha256:{hashlib.sha256((folder / 'taught-F16.gguf').read_bytes()).hexdigest()}"
    made = server.models["me/taught:v1"]
    assert made["files"] == {"taught-F16.gguf": digest}
    assert made["parameters"] == {"num_ctx": 1024, "stop": ["<|im_end|>"]}
    assert made["system"] == "Be brief."
    assert "slice $.Messages" in made["template"]
    blob = f"/api/blobs/{digest}"
    assert server.requests == [f"HEAD {blob}", f"POST {blob}", "POST /api/create", "POST /api/chat"]
    assert call(*arguments, "--quantize", "q4_K_M", "--prompt", "") == 0  # again: nothing is uploaded twice
    assert server.requests[4:] == [f"HEAD {blob}", "POST /api/create"]
    assert server.models["me/taught:v1"]["quantize"] == "q4_K_M"


def test_dry_run_sends_nothing(folder: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("deploy", "ollama", "mine", folder, "--host", server.url, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "would upload" in shown
    assert "would create mine" in shown
    assert server.requests == []


def test_adapter_over_a_model_of_the_server(adapter: Path, tmp_path: Path, server: Server) -> None:
    arguments = ("as_adapter=true", "base=there", "-o", tmp_path / "out")
    assert call("export", adapter, "--to", "ollama", *arguments) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == ["taught-lora.gguf"]
    assert call("deploy", "ollama", "mine", tmp_path / "out", "--host", server.url) == 0
    made = server.models["mine:latest"]
    assert made["from"] == "there"
    assert list(made["adapters"]) == ["taught-lora.gguf"]


def test_adapter_beside_its_base_is_compared(adapter: Path, tmp_path: Path) -> None:
    arguments = ("--type", "f32", "as_adapter=true", "-o", tmp_path / "out")
    assert call("export", adapter, "--to", "ollama", *arguments) == 0
    described = dict(read((tmp_path / "out" / "Modelfile").read_text()))
    assert described["from"] == "./taught-base-F32.gguf"
    assert described["adapter"] == "./taught-lora.gguf"
    (compared,) = json.loads((tmp_path / "out" / "export.json").read_text())["comparisons"]
    assert compared["mean_kl"] < 1e-7


def test_refusals(folder: Path, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    host = ("--host", server.url)
    assert call("deploy", "ollama", "mine", tmp_path, *host) == ModelError.exit_code
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").touch()
    assert call("deploy", "ollama", "mine", tmp_path / "other", *host) == ModelError.exit_code
    assert "--to ollama -o ANOTHER_FOLDER" in capsys.readouterr().err  # an export goes into no folder that is full
    assert call("deploy", "ollama", "mine", folder, *host, "--quantize", "q2_k") == ConfigError.exit_code
    assert call("deploy", "ollama", "not a name", folder, *host) == 5
    assert "invalid model name" in capsys.readouterr().err
    assert call("deploy", "ollama", "mine", folder, "--host", "127.0.0.1:9") == 5
    assert "no Ollama server answers there" in capsys.readouterr().err
    (tmp_path / "Modelfile").write_text("FROM ./gone.gguf\n")
    assert call("deploy", "ollama", "mine", tmp_path, *host) == ModelError.exit_code
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "Modelfile").write_text("FROM ./a/m.gguf\nFROM ./b/m.gguf\n")
    assert call("deploy", "ollama", "mine", tmp_path, *host) == ModelError.exit_code
    assert "which an upload cannot tell apart" in capsys.readouterr().err
    (tmp_path / "Modelfile").write_text("FROM nobody-has-it\n")
    assert call("deploy", "ollama", "mine", tmp_path, *host) == 5
    assert "not found" in capsys.readouterr().err


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    assert server_url(None) == "http://127.0.0.1:11434"
    assert server_url("0.0.0.0") == "http://127.0.0.1:11434"
    assert server_url("https://there") == "https://there:443"
    assert server_url("[::1]:80") == "http://[::1]:80"
    monkeypatch.setenv("OLLAMA_HOST", "box:1")
    assert server_url(None) == "http://box:1"
    with pytest.raises(ConfigError, match="expected host:port"):
        server_url("box:many")

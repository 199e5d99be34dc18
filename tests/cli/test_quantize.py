"""`lowrank quantize`, as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank.cli.main import main
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load
from lowrank.models.storages.packed import PackedLinear
from tests.checkpoint_folder import save_checkpoint_folder


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["quantize", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint_folder(tmp_path / "model", hidden_size=256, intermediate_size=512)


@pytest.mark.parametrize(("storage", "bits"), [("nf4", 4.13), ("fp4", 4.13), ("int8", 8.1)])
def test_writes_what_a_run_loads(storage: str, bits: float, folder: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    assert run(str(folder), "-o", str(out), "--storage", storage, "--json", "model.dtype=float32") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["layers"] == 14
    assert result["bits_per_parameter"] == pytest.approx(bits, abs=0.03)
    assert result["bytes"] < 0.4 * result["original_bytes"]
    base = load(ModelConfig(path=str(out), device="cpu"))
    assert sum(isinstance(module, PackedLinear) for module in base.model.modules()) == 14
    assert run(str(folder), "-o", str(out)) == 5
    assert "exists already" in capsys.readouterr().err
    assert run(str(out), "-o", str(tmp_path / "twice")) == 4
    assert "quantized already" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--storage", "hqq"], "has no file format of its own: nf4, fp4, int8"),
        (["--storage", "nf5"], "there is no type 'nf5'"),
        (["model.storage.block_size=60"], "block_size: expected"),
        (["optimizer.learning_rate=1"], "only settings of model"),
    ],
)
def test_mistakes(arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert run(str(folder), "-o", str(tmp_path / "out"), *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_folder_must_be_said(folder: Path) -> None:
    assert run(str(folder)) == 2

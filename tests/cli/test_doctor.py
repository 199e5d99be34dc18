"""`lowrank doctor`, and the page it has in common with the docs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lowrank
from lowrank.adapters import storage_capabilities
from lowrank.adapters.storages_page import page
from lowrank.cli.main import main
from lowrank.models.loading import pretrained


def test_it_finds_every_storage_in_order(monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(pretrained, "processor_has_bf16", lambda: True)
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert caught.value.code == 0
    by_name = {each["storage"]: each for each in found["storages"]["cpu"]}
    assert by_name.keys() >= {"dense", "nf4", "fp4", "int8"}
    assert all(each["train"] and each["merge"] for each in found["storages"]["cpu"])
    tried = [(each["storage"], each["dtype"]) for each in found["storages"]["cpu"]]
    assert tried == [(name, dtype) for dtype in ("float32", "bfloat16") for name in by_name], (
        "what a run computes in too"
    )
    assert by_name["nf4"]["bits"] == pytest.approx(4.127, abs=2e-3)
    assert by_name["nf4"]["relative_error"] == pytest.approx(0.092, abs=1e-3)
    assert found["environment"]["torch"] == torch.__version__
    assert "bitsandbytes" in found["readers"]
    assert [name for name in found["readers"] if name.startswith("compressed")] == ["compressed-tensors"]


def test_a_wrong_gradient_is_told(monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(storage_capabilities, "gradient_errors", lambda *_: {"after an evaluation": 0.8})
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--json"])
    assert caught.value.code == 1
    found = json.loads(capsys.readouterr().out)["storages"]["cpu"]
    assert {each["problem"] for each in found} == {"wrong gradient: after an evaluation"}


def test_the_page_is_current() -> None:
    saved = Path(lowrank.__file__).parent.parent / "docs" / "storages.md"
    assert saved.read_text(encoding="utf-8") == page(), "python -m lowrank.adapters.storages_page > docs/storages.md"

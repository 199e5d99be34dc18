"""Value heads on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lowrank.checkpoints.value_head import FILE, read_value_head, write_value_head
from lowrank.errors import ModelError
from tests.tiny_models import make_model


def test_written_and_read(tmp_path: Path) -> None:
    assert read_value_head(tmp_path) is None
    value_D = torch.randn(32)
    write_value_head(tmp_path, value_D)
    found = read_value_head(tmp_path)
    assert found is not None
    assert torch.equal(found, value_D)


def test_transformers_sequence_classifier_takes_it(tmp_path: Path) -> None:
    """By name and shape, so a reward model is one of theirs."""
    write_value_head(tmp_path, torch.randn(32))
    config = make_model("llama").config
    config.num_labels = 1
    theirs = transformers.LlamaForSequenceClassification(config)
    missing, unexpected = theirs.load_state_dict(load_file(tmp_path / FILE), strict=False)
    assert not unexpected
    assert "score.weight" not in missing


def test_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"v_head.summary.weight": torch.zeros(1, 32)}, tmp_path / FILE)
    with pytest.raises(ModelError, match=r"expected score.weight \(1, hidden size\), got v_head"):
        read_value_head(tmp_path)

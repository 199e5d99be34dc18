"""The importance matrix against plain hooks on transformers' own model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import lowrank.models.tiny
from lowrank.errors import DataError
from lowrank.export.gguf.convert import convert, plan
from lowrank.export.gguf.importance import cut, documents_for, measure
from lowrank.export.gguf.model import read_folder
from lowrank.export.gguf.quantize import quantize_file
from lowrank.export.source import Source
from lowrank.kernels import accelerators
from lowrank.models.config import ModelConfig
from lowrank.segments import unweighted
from tests.kernels.test_accelerators import NoFloat64

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

TINY = Path(lowrank.models.tiny.__file__).parent


@pytest.fixture
def source():
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    model = ModelConfig(path="lowrank/tiny", dtype="float32", device="cpu")
    return Source("tiny", TINY, model, None, tokenizer, tokenizer.chat_template)


def test_mean_squares_of_the_inputs(source, tmp_path):
    tokens = np.random.default_rng(0).integers(3, 3000, 64)
    found = measure(source, plan(read_folder(TINY)), [unweighted(tokens[:40]), unweighted(tokens[40:])])
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    received = []
    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda module, given: received.append(given[0][0]))
    with torch.no_grad():
        for part in (tokens[:40], tokens[40:]):
            model(torch.tensor(part)[None])
    expected = torch.cat(received).square().mean(0).numpy()
    np.testing.assert_allclose(found["blk.2.ffn_down.weight"], expected, rtol=1e-4)
    assert len(found) == 6 * 7
    convert(TINY, tmp_path / "tiny.gguf")
    assert "IQ2_XXS" in quantize_file(tmp_path / "tiny.gguf", tmp_path / "iq2.gguf", "iq2_xxs", importance=found).kinds


def test_without_float64(source, monkeypatch):
    """As on Apple's GPUs."""
    tokens = np.random.default_rng(0).integers(3, 3000, 16)
    expected = measure(source, plan(read_folder(TINY)), [unweighted(tokens)])
    monkeypatch.setattr(accelerators, "widest", lambda device: torch.float32)
    with NoFloat64():
        found = measure(source, plan(read_folder(TINY)), [unweighted(tokens)])
    for name, square_D in expected.items():
        np.testing.assert_allclose(found[name], square_D, rtol=1e-5)


def test_rows_it_was_trained_on(source):
    rows = [unweighted(np.arange(3, 403))] * 60
    trained = Source(**{**vars(source), "documents": lambda count: rows[:count]})
    assert documents_for(trained, None, needed=False) == []
    assert sum(map(len, documents_for(trained, "data", needed=False))) == 41 * 400  # the first past MOST
    assert len(documents_for(trained, None, needed=True)) == 41
    with pytest.raises(DataError, match="name a text file"):
        documents_for(source, "data", needed=False)


def test_too_short_a_text_is_refused(source):
    with pytest.raises(DataError, match="at least 512"):
        cut(source, "Hello")

"""Whole models are written as transformers reads them, also where lowrank had wrapped a layer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from lowrank.adapters.embedding import RoutedEmbedding
from lowrank.adapters.routing import Routing
from lowrank.checkpoints.full_model import save_full
from tests.tiny_models import make_model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_round_trip(wrapped: bool, tied: bool, tmp_path: Path) -> None:
    model = make_model("llama", torch.float32, tie_word_embeddings=tied)
    token = torch.tensor([[5, 9, 11, 3]])
    expected = model(token).logits
    if wrapped:  # as for NEFTune noise
        model.set_submodule(
            "model.embed_tokens", RoutedEmbedding(model.model.embed_tokens, "model.embed_tokens", Routing())
        )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, "a")))
    for _ in range(2):  # the second replaces the first
        save_full(tmp_path / "last", model, tokenizer.save_pretrained)
    assert os.listdir(tmp_path) == ["last"]
    assert {path.suffix for path in (tmp_path / "last").iterdir()} == {".json", ".safetensors"}
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "last", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(loaded(token).logits, expected)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "last").convert_tokens_to_ids(["a", "b"]) == [0, 1]

"""Adapters that llama.cpp applies over the base's file, against PEFT."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch

from lowrank.checkpoints.peft_layout import load_adapter
from lowrank.errors import ModelError
from lowrank.export.gguf.adapter import write_adapter_file
from lowrank.export.gguf.convert import convert, plan
from lowrank.export.gguf.llama_cpp import LlamaCpp, squared_error
from lowrank.export.gguf.model import read_folder
from tests.export.gguf.families import FAMILIES, save

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

TOKENS = np.random.default_rng(0).integers(3, 600, 40).tolist()
PATTERNS = {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"layers.0.mlp.up_proj": 5}}


def adapted(family, folder, **settings):
    """The base in `folder`, a random adapter in `folder/adapter`, and PEFT's model of both."""
    model = save(family, folder)
    settings = {"target_modules": "all-linear", "r": 4, "lora_alpha": 16, **settings}
    if family == "gpt2":
        settings["fan_in_fan_out"] = True
    torch.manual_seed(1)
    both = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **settings)).eval()
    both.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return both


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, PATTERNS], ids=["plain", "rslora", "patterns"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_scale_is_exact(family, settings, tmp_path):
    check(adapted(family, tmp_path, **settings), family, tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "falcon grouped", "phi3", "gemma2", "granite"])
def test_rows_follow_the_weights(family, tmp_path):
    check(adapted(family, tmp_path), family, tmp_path)


def test_an_adapted_embedding_and_head(tmp_path):
    both = adapted("llama", tmp_path, target_modules=["embed_tokens", "lm_head", "k_proj"])
    check(both, "llama", tmp_path)


def check(both, family, folder):
    made = convert(folder, folder / "base.gguf", "f32")
    write_adapter_file(made, load_adapter(folder / "adapter"), folder / "adapter.gguf")
    with torch.no_grad():
        expected = both(torch.tensor([TOKENS])).logits[0].numpy()
        with both.disable_adapter():
            bare = both(torch.tensor([TOKENS])).logits[0].numpy()
    with LlamaCpp(folder / "base.gguf", adapters=[(folder / "adapter.gguf", 1.0)]) as llama:
        assert squared_error(llama.logits(TOKENS), expected) < FAMILIES[family][1]
    assert squared_error(bare, expected) > 1e-2


def test_what_cannot_be_applied_at_run_time_is_refused(tmp_path):
    adapted("llama tied", tmp_path, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    adapter = load_adapter(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"embed_tokens: embedding and head are one tensor[\s\S]*") as error:
        write_adapter_file(plan(read_folder(tmp_path)), adapter, tmp_path / "adapter.gguf")
    assert "--to gguf" in str(error.value)


def test_modules_trained_whole_are_refused(tmp_path):
    adapted("llama", tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match="lm_head was trained whole"):
        write_adapter_file(plan(read_folder(tmp_path)), load_adapter(tmp_path / "adapter"), tmp_path / "adapter.gguf")

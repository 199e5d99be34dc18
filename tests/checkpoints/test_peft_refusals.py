"""Adapter files that cannot be used: every problem is named, at once, and nothing of a stranger's runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank.adapters.variants import lora
from lowrank.checkpoints.adapter_folder import CONFIG_FILE, TENSOR_FILE
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import (
    load_adapter,
    save_adapter,
)
from lowrank.errors import ModelError
from tests.checkpoints.test_peft_layout import random_adapter, read_fields, saved_by_peft
from tests.tiny_models import make_model


def a_saved_adapter(folder: Path, **fields: Any) -> Path:
    model = make_model("llama")
    adapter = random_adapter(model, lora.LoraConfig(rank=2, target_modules=("q_proj",)))
    save_adapter(folder, adapter, describe_base(model, "tiny"))
    rewrite(folder, fields)
    return folder


def rewrite(folder: Path, fields: Mapping[str, Any]) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps({**read_fields(folder), **fields}))


def test_every_unsupported_field_is_named_at_once(tmp_path: Path) -> None:
    folder = a_saved_adapter(
        tmp_path / "a",
        lora_bias=True,
        bias="all",
        trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [3]},
        init_lora_weights="pissa",
        a_field_of_tomorrow=3,
        layer_replication=None,
    )
    with pytest.raises(ModelError) as caught:
        load_adapter(folder)
    message = str(caught.value)
    for name in ("lora_bias", "bias: 'all'", "trainable_token_indices",
                 "init_lora_weights: 'pissa'", "path_initial_model_for_weight_conversion",
                 "a_field_of_tomorrow"):  # fmt: skip
        assert name in message
    assert "layer_replication" not in message


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_refused_starts_do_alter_the_base(start: str, tmp_path: Path) -> None:
    model = make_model("llama", torch.float32)
    saved_by_peft(model, tmp_path / "a", r=2, target_modules=["q_proj"], init_lora_weights=start)
    with pytest.raises(ModelError, match="altered the base"):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "BOFT"}, "peft_type is 'BOFT'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices: .* holds no token_adapter"),
        ({"use_dora": True}, "lora_magnitude_vector: missing, though use_dora is set"),
        ({"peft_type": "LOHA", "lora_alpha": None}, "q_proj.lora_A.weight: unknown tensor name for a LOHA adapter"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"r": 0}, "r: "),
        ({"lora_alpha": -1}, "lora_alpha: "),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern: 'q_proj' has '8'"),
        ({"alpha_pattern": {"q_(proj": 8}}, "alpha_pattern: 'q_\\(proj' is no regular expression"),
        ({"r": 3}, r"q_proj.lora_A.weight: shape \(2, 32\), expected \(3, ...\)"),
    ],
)
def test_refuses(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load_adapter(a_saved_adapter(tmp_path / "a", **fields))


def test_every_misfitting_tensor_is_named_at_once(tmp_path: Path) -> None:
    folder = a_saved_adapter(tmp_path / "a")
    tensors = load_file(folder / TENSOR_FILE)
    first, second = (f"base_model.model.model.layers.{index}.self_attn.q_proj" for index in (0, 1))
    del tensors[f"{first}.lora_B.weight"]
    tensors[f"{second}.lora_A.weight"] = torch.zeros(5, 32)
    tensors[f"{second}.lora_magnitude_vector"] = torch.zeros(5)
    tensors["stray"] = torch.zeros(1)
    save_file(tensors, folder / TENSOR_FILE)
    with pytest.raises(ModelError) as caught:
        load_adapter(folder)
    message = str(caught.value)
    assert "model.layers.0.self_attn.q_proj.lora_B.weight: missing" in message
    assert "model.layers.1.self_attn.q_proj.lora_A.weight: shape (5, 32), expected (2, ...)" in message
    assert "lora_magnitude_vector: unknown tensor name" in message
    assert "stray: names in adapter_model.safetensors begin with" in message


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    folder = a_saved_adapter(tmp_path / "a")
    torch.save(load_file(folder / TENSOR_FILE), folder / "adapter_model.bin")
    (folder / TENSOR_FILE).unlink()
    with pytest.raises(ModelError, match="a pickle, which can run code"):
        load_adapter(folder)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    folder = a_saved_adapter(tmp_path / "a")
    whole = (folder / TENSOR_FILE).read_bytes()
    (folder / TENSOR_FILE).write_bytes(whole[:-9])
    with pytest.raises(ModelError, match="damaged"):
        load_adapter(folder)
    (folder / TENSOR_FILE).unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_adapter(folder)
    (folder / CONFIG_FILE).write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        load_adapter(folder)
    with pytest.raises(ModelError, match="no adapter in PEFT's layout"):
        load_adapter(tmp_path / "nowhere")


def test_a_variant_without_a_form_in_peft_is_not_saved_as_something_else(tmp_path: Path) -> None:
    class Config(lora.LoraConfig):
        peft_fields = None

    model = make_model("llama")
    adapter = random_adapter(model, Config(rank=2, target_modules=("q_proj",)))
    with pytest.raises(ModelError, match="has no form in PEFT's layout"):
        save_adapter(tmp_path / "a", adapter, describe_base(model, "tiny"))
    assert list(tmp_path.iterdir()) == []

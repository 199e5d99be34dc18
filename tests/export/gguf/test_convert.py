"""Converted models against transformers, computed by llama.cpp itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lowrank.errors import ModelError
from lowrank.export.gguf.convert import convert, plan
from lowrank.export.gguf.families import families
from lowrank.export.gguf.llama_cpp import LlamaCpp, squared_error
from lowrank.export.gguf.model import read_folder
from tests.export.gguf.families import FAMILIES, VOCABULARY, save
from tests.tiny_composites import COMPOSITES

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


def logits_of(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(family, tmp_path):
    model = save(family, tmp_path)
    convert(tmp_path, tmp_path / "model.gguf", "f32")
    tokens = np.random.default_rng(0).integers(3, VOCABULARY - 40, 48).tolist()
    with LlamaCpp(tmp_path / "model.gguf") as llama:
        error = squared_error(llama.logits(tokens), logits_of(model, tokens))
    assert error < FAMILIES[family][1]


def test_every_family_is_tested(tmp_path):
    composites = {COMPOSITES[name]().get_text_config().model_type for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")}
    assert set(families()) <= {config().model_type for config, _ in FAMILIES.values()} | composites


def test_the_bound_sees_a_wrong_epsilon(tmp_path):
    model = save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 2 * config["rms_norm_eps"]}))
    convert(tmp_path, tmp_path / "model.gguf", "f32")
    tokens = list(range(3, 40))
    with LlamaCpp(tmp_path / "model.gguf") as llama:
        assert squared_error(llama.logits(tokens), logits_of(model, tokens)) > 1e-9


@pytest.mark.parametrize(("kind", "bound"), [("f16", 1e-5), ("bf16", 1e-3), ("q8_0", 1e-2)])
def test_types_of_the_converter(kind, bound, tmp_path):
    model = save("qwen3_moe", tmp_path)
    convert(tmp_path, tmp_path / "model.gguf", kind)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds == {"F32", kind.upper()}
    tokens = list(range(3, 40))
    with LlamaCpp(tmp_path / "model.gguf") as llama:
        assert squared_error(llama.logits(tokens), logits_of(model, tokens)) < bound


def test_the_natural_type_changes_no_weight(tmp_path):
    model = save("qwen2", tmp_path, torch.bfloat16)
    convert(tmp_path, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    stored = tensors["blk.1.ffn_up.weight"]
    assert stored.tensor_type.name == "BF16"
    weight = model.model.layers[1].mlp.up_proj.weight.float().detach().numpy()
    np.testing.assert_array_equal(gguf.quants.dequantize(stored.data, stored.tensor_type), weight)


def test_an_unknown_family_is_refused_by_name(tmp_path):
    model = save("llama", tmp_path)
    del model
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "opt", "architectures": ["OPT"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"cannot write 'opt' models to GGUF[\s\S]*qwen3_moe"):
        convert(tmp_path, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("family", "change", "described"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar: 99"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family, change, described, tmp_path):
    save(family, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=described):
        plan(read_folder(tmp_path))


def test_a_tensor_without_a_place_is_named(tmp_path):
    model = save("llama", tmp_path)
    model.model.layers[0].strange = torch.nn.Linear(3, 3, bias=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"layers\.0\.strange\.weight"):
        plan(read_folder(tmp_path))

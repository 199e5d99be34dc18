"""Quantized files: the types llama.cpp would choose, and weights that are still the model's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import lowrank.models.tiny
from lowrank.errors import ModelError
from lowrank.export.gguf import quantize
from lowrank.export.gguf.convert import convert
from lowrank.export.gguf.header import read_header
from lowrank.export.gguf.llama_cpp import LlamaCpp, squared_error
from lowrank.export.gguf.mixes import BASES, FALLBACKS, choose_types, describe
from lowrank.export.gguf.quantize import quantize_file
from tests.export.gguf import make_quantized_fixtures as made

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

TINY = Path(lowrank.models.tiny.__file__).parent
TOKENS = np.random.default_rng(0).integers(3, 3000, 64).tolist()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    convert(TINY, path)
    return path


@pytest.fixture(scope="module")
def reference(source):
    with LlamaCpp(source) as llama:
        return llama.logits(TOKENS)


def qwen_shapes(layers=24):
    """Qwen 2.5 0.5B: 896 wide, which 256 does not divide."""
    shapes = {"token_embd.weight": (151936, 896), "output_norm.weight": (896,)}
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (896,), "attn_q": (896, 896), "attn_k": (128, 896), "attn_v": (128, 896),
                "attn_output": (896, 896), "ffn_gate": (4864, 896), "ffn_up": (4864, 896), "ffn_down": (896, 4864),
            }.items()
        }  # fmt: skip
    return shapes


def test_a_width_that_256_does_not_divide():
    shapes = qwen_shapes()
    header = {"qwen2.block_count": 24, "qwen2.attention.head_count": 14, "qwen2.attention.head_count_kv": 2}
    chosen = choose_types("Q4_K_M", describe("qwen2", header, shapes), shapes, False)
    kinds = [kind for kind in chosen.values() if kind]
    assert kinds.count("Q5_0") == 132  # what llama-quantize made of it: 132 x q5_0 (anchor of 2026-11-21)
    assert chosen["token_embd.weight"] == "Q8_0"
    assert chosen["blk.0.attn_norm.weight"] is None
    assert {chosen["blk.0.ffn_down.weight"], chosen["blk.5.ffn_down.weight"]} == {"Q6_K"}
    assert chosen["blk.3.ffn_down.weight"] == "Q4_K"


FIXTURE = json.loads(made.FIXTURE.read_text(encoding="utf-8"))
QUICK = [
    ("dense", "Q2_K"), ("dense", "Q3_K_L"), ("dense", "Q4_K_M"), ("dense", "Q5_K_S"), ("dense", "Q6_K"),
    ("no multiple of 256", "Q3_K_M"), ("no multiple of 256", "Q5_K_M"), ("experts", "Q4_K_M"),
]  # fmt: skip
CASES = [
    pytest.param(model, recipe, marks=[] if (model, recipe) in QUICK else pytest.mark.slow, id=f"{model} {recipe}")
    for model in made.MODELS
    for recipe in made.RECIPES
]


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_the_same_bytes_as_llama_model_quantize(model, recipe, tmp_path):
    """Types and bytes of every tensor; what llama.cpp's own quantizer wrote is kept as a hash."""
    made.write_model(tmp_path / "source.gguf", **made.MODELS[model])
    assert made.digest(tmp_path / "source.gguf") == FIXTURE[model]["source"], "numpy draws other numbers"
    written = quantize_file(tmp_path / "source.gguf", tmp_path / "target.gguf", recipe, threads=1)
    assert made.digest(written.path) == FIXTURE[model][recipe]


@pytest.mark.parametrize(
    ("recipe", "bound"),
    [("Q6_K", 1e-3), ("Q4_K_M", 1e-2), ("Q3_K_M", 1e-2), ("IQ4_XS", 1e-2)],
)  # fmt: skip
def test_the_model_survives(recipe, bound, source, reference, tmp_path):
    written = quantize_file(source, tmp_path / "quantized.gguf", recipe, threads=2)
    with LlamaCpp(written.path) as llama:
        assert squared_error(llama.logits(TOKENS), reference) < bound
    kinds = {BASES[recipe], FALLBACKS.get(BASES[recipe])} - {None}
    assert kinds & set(written.kinds)
    assert str(written).startswith("quantized.gguf: ")


def test_rows_are_what_the_kernels_make_of_them(source, tmp_path):
    """gguf's own numpy quantizer is the other opinion."""
    written = quantize_file(source, tmp_path / "q8.gguf", "q8_0")
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    for tensor in gguf.GGUFReader(written.path).tensors:
        if tensor.tensor_type.name == "Q8_0":
            origin = before[tensor.name]
            rows = gguf.quants.dequantize(origin.data, origin.tensor_type)
            np.testing.assert_array_equal(tensor.data, gguf.quants.quantize(rows, tensor.tensor_type))


def test_the_number_of_threads_changes_nothing(source, tmp_path, monkeypatch):
    one = quantize_file(source, tmp_path / "one.gguf", "q4_k_m", threads=1)
    three = quantize_file(source, tmp_path / "three.gguf", "q4_k_m", threads=3)
    assert one.path.read_bytes() == three.path.read_bytes()


def test_without_kernels_numpy_does_what_it_can(source, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "_kernels", lambda: None)
    written = quantize_file(source, tmp_path / "q4.gguf", "q4_0")
    assert "cannot be reached" in written.notes[0]
    with LlamaCpp(written.path) as llama:
        assert squared_error(llama.logits(TOKENS), reference) < 2e-2
    with pytest.raises(ModelError, match=r"q4_k_m needs llama\.cpp's kernels"):
        quantize_file(source, tmp_path / "no.gguf", "q4_k_m")


def test_low_bits_need_importance(source, tmp_path):
    with pytest.raises(ModelError, match="iq2_xxs needs an importance matrix for 6 tensors"):
        quantize_file(source, tmp_path / "iq2.gguf", "iq2_xxs")
    assert not list(tmp_path.iterdir())


def test_importance_is_used(source, reference, tmp_path):
    shapes = {tensor.name: tensor.shape for tensor in gguf.GGUFReader(source).tensors}
    weights = {
        name: np.random.default_rng(0).random(int(shape[0]), dtype=np.float32) + 0.01
        for name, shape in shapes.items()
        if len(shape) > 1
    }
    written = quantize_file(source, tmp_path / "iq2.gguf", "iq2_xxs", importance=weights)
    with LlamaCpp(written.path) as llama:
        assert squared_error(llama.logits(TOKENS), reference) < 0.3
    plain = quantize_file(source, tmp_path / "a.gguf", "q4_k_m")
    weighted = quantize_file(source, tmp_path / "b.gguf", "q4_k_m", importance=weights)
    assert plain.path.read_bytes() != weighted.path.read_bytes()


def test_the_header_is_the_source_s_but_for_the_type(source, tmp_path):
    written = quantize_file(source, tmp_path / "q4.gguf", "q4_0")
    before, after = read_header(source), read_header(written.path)
    changed = {name for name in before.raw if before.raw[name] != after.raw[name]}
    assert changed == {"general.file_type"}
    theirs = gguf.GGUFReader(written.path)
    for name, value in after.fields.items():
        assert theirs.fields[name].contents() == (list(value) if isinstance(value, tuple) else value)
    for tensor in theirs.tensors:
        stored = after.tensors[tensor.name]
        assert (stored.entry.kind, stored.start) == (tensor.tensor_type, tensor.data_offset)
        np.testing.assert_array_equal(after.rows(tensor.name).reshape(-1), tensor.data.reshape(-1))
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"cut\.gguf: damaged, or no GGUF file of version 3"):
        read_header(tmp_path / "cut.gguf")


def test_an_unknown_type_is_refused(source, tmp_path):
    with pytest.raises(ModelError, match="no GGUF type 'q4_k_x'; did you mean 'q4_k"):
        quantize_file(source, tmp_path / "no.gguf", "q4_k_x")

"""Every reader against files packed by the tool itself, and against the weight the tool itself unpacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowrank.errors import ModelError
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load
from lowrank.models.prequantized import reader_for
from lowrank.models.prequantized.eetq import undone
from lowrank.models.storages.eetq import quantize
from lowrank.models.storages.packed import PackedLinear
from tests.tiny_models import make_model

FOLDER = Path(__file__).parent / "fixtures"
NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
LAYER = "model.layers.0.mlp.up_proj"


def read(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]:
    """The quantization_config, a linear's tensors by suffix, and the dense weight (O, D)."""
    with safe_open(str(FOLDER / f"{name}.safetensors"), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["quantization_config"])
    return config, tensors, tensors.pop("dense")


def build(name: str, dtype: torch.dtype, bias: torch.Tensor | None = None, **changes: Any) -> PackedLinear:
    config, tensors, _ = read(name)
    reader = reader_for({**config, **changes})
    assert reader is not None
    assert set(tensors) <= set(reader.suffixes), "every tensor of the layer is known to the reader"
    module = reader.build(LAYER, tensors, bias, dtype)
    assert isinstance(module, PackedLinear)
    return module


def test_there_are_fixtures_of_every_tool() -> None:
    tools = {"gptq", "awq", "compressed", "fp8", "aqlm", "torchao", "hqq", "eetq"}
    assert {name.split("_")[0] for name in NAMES} == tools


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_is_the_tools_own(name: str) -> None:
    """Bit for bit in the dtype the tool computed in (it rounds each product once, and so do we)."""
    _, _, dense_OD = read(name)
    weight_OD = build(name, dense_OD.dtype).dense_weight()
    assert weight_OD.shape == dense_OD.shape == (64, 128)
    # hqq subtracts in 16 bits, so its own weight is off by a rounding of the difference
    tolerance = {"rtol": 2e-3, "atol": 2e-4} if name.startswith("hqq") else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(weight_OD, dense_OD, **tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_canary(name: str) -> None:
    """y and dx equal those of the dense weight in float64, before and after an evaluation, to float32 rounding."""
    bias_O = torch.randn(64)
    module = build(name, torch.float32, bias_O)
    dense_OD = module.dense_weight().double().clone()
    x_TD, dy_TO = torch.randn(5, 128, dtype=torch.float64), torch.randn(5, 64, dtype=torch.float64)
    for round_ in range(2):
        module.train()
        leaf_TD = x_TD.float().requires_grad_()
        y_TO = module(leaf_TD)
        y_TO.backward(dy_TO.float())
        assert leaf_TD.grad is not None
        torch.testing.assert_close(y_TO.double(), x_TD @ dense_OD.T + bias_O, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(leaf_TD.grad.double(), dy_TO @ dense_OD, rtol=1e-5, atol=1e-5)
        module.eval()
        with torch.inference_mode():
            again_TO = module(x_TD.float())
        assert torch.equal(again_TO, y_TO.detach()), f"evaluation differs from training in round {round_}"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_dense_is_kept(name: str) -> None:
    module = build(name, torch.float32)
    leaf_TD = torch.randn(5, 128, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        module(leaf_TD)
    assert all(tensor.numel() < 64 * 128 for tensor in saved)
    kept = sum(buffer.nbytes for buffer in module.buffers())
    if not name.startswith("aqlm"):  # a codebook is shared by more weights in a real layer
        assert kept * 8 / (64 * 128) < 10.01, "bits per weight in memory"


@pytest.mark.parametrize(("bits", "kept"), [(2, 2), (3, 3), (4, 4), (8, 8)])
def test_gptq_stays_as_tight_in_memory_as_on_disk(bits: int, kept: int) -> None:
    module = build(f"gptq_{bits}_sym", torch.float32)
    assert module.get_buffer("packed").nbytes * 8 == kept * 64 * 128
    assert module.get_buffer("zero").numel() == 1, "symmetric: one zero point for all"


def test_gptq_version_1_and_2_differ_by_one_in_the_zero_point() -> None:
    wrong = build("gptq_4_v2", torch.float16, checkpoint_format="gptq").dense_weight().clone()
    _, tensors, dense_OD = read("gptq_4_v2")
    step_OD = tensors["scales"].t().repeat_interleave(32, dim=1)
    inner = (wrong - (dense_OD - step_OD)).abs().float() < 1e-3
    assert inner.float().mean() > 0.9


def test_gptq_zero_point_of_zero_borrows_from_its_neighbor() -> None:
    """GPTQModel subtracts whole words: reading field by field would be off for a group whose least weight is zero."""
    config, tensors, _ = read("gptq_4_v2")
    zero_GW = tensors["qzeros"].clone()
    zero_GW[0, 0] = 0x12345670
    version_1 = zero_GW.clone()
    version_1[0, 0] = 0x12345670 - 0x11111111
    version_1[0, 1:] -= 0x11111111
    version_1[1:] -= 0x11111111
    newer, older = (
        reader_for({**config, "checkpoint_format": layout}).build(  # type: ignore[union-attr]
            LAYER, {**tensors, "qzeros": zeros}, None, torch.float32
        )
        for layout, zeros in (("gptq_v2", zero_GW), ("gptq", version_1))
    )
    assert torch.equal(newer.zero, older.zero)
    assert newer.zero[:8, 0].tolist() == [0, 7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("name", ["gptq_4_ordered", "compressed_packed_4_sym", "fp8_block", "hqq_3", "aqlm_2x8"])
def test_moves_between_dtypes_and_keeps_its_state(name: str) -> None:
    module = build(name, torch.float32)
    before = module.dense_weight().clone()
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    for buffer in module.buffers():
        buffer.view(torch.uint8).zero_()
    module.load_state_dict(state)
    assert torch.equal(module.dense_weight(), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(name: str) -> None:
    config, tensors, _ = read(name)
    reader = reader_for(config)
    assert reader is not None
    optional = {"g_idx", "weight_zero_point", "_weight_zero_point", "weight_packed"}
    settings = {"axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype"}
    settings |= {"offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"}
    for suffix in sorted(set(tensors) - optional - settings - {"group_size"}):
        rest = {key: tensor for key, tensor in tensors.items() if key != suffix}
        with pytest.raises(ModelError, match=rf"{LAYER}\.(\w+): not in the checkpoint"):
            reader.build(LAYER, rest, None, torch.float32)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("gptq_4_sym", "scales"),
        ("gptq_4_sym", "qzeros"),
        ("awq_4", "qzeros"),
        ("compressed_packed_4_sym", "weight_packed"),
        ("compressed_packed_4_asym", "weight_zero_point"),
        ("torchao_row", "_weight_scale"),
        ("aqlm_2x8", "codebooks"),
        ("hqq_4", "W_q"),
    ],
)
def test_a_tensor_cut_short_is_named(name: str, suffix: str) -> None:
    config, tensors, _ = read(name)
    reader = reader_for(config)
    assert reader is not None
    with pytest.raises(ModelError, match=rf"{LAYER}\.\w+: .*(expected|do not fit)"):
        reader.build(LAYER, {**tensors, suffix: tensors[suffix][:-1]}, None, torch.float32)


def test_eetq_under_its_own_names_and_of_sizes_that_it_has_not() -> None:
    """transformers says `weight`, the package itself `qweight`."""
    config, tensors, dense_OD = read("eetq_8")
    reader = reader_for(config)
    assert reader is not None
    own = {"qweight": tensors["weight"], "weight_scales": tensors["weight_scales"]}
    assert torch.equal(reader.build(LAYER, own, None, torch.float16).dense_weight(), dense_OD)
    with pytest.raises(ModelError, match="a layer of 96 inputs and 64 outputs"):
        reader.build(LAYER, {**tensors, "weight": tensors["weight"][:96]}, None, torch.float16)


def test_an_eetq_folder_loads(tmp_path: Path) -> None:
    """As transformers writes it: the same logits as of the dense model with these weights."""
    model = make_model(
        "llama", torch.float32, hidden_size=64, intermediate_size=128, head_dim=16, num_key_value_heads=4
    )
    stored: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            code_OD, scale_O1 = quantize(module.weight)
            rows, columns = code_OD.shape
            place_OD = undone(torch.arange(rows * columns), columns, rows)
            in_file = torch.empty(rows * columns, dtype=torch.uint8)
            in_file[place_OD.flatten()] = code_OD.flatten()
            stored[f"{name}.weight"] = in_file.view(torch.int8).view(columns, rows)
            stored[f"{name}.weight_scales"] = scale_O1[:, 0]
            module.weight.copy_((code_OD.float() - 128) * scale_O1.float())
    model.save_pretrained(tmp_path)
    save_file({**load_file(tmp_path / "model.safetensors"), **stored}, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = load(ModelConfig(path=str(tmp_path), dtype="float32", device="cpu"), tokenizer=object())
    assert isinstance(base.model.get_submodule("model.layers.0.mlp.up_proj"), PackedLinear)
    token = torch.tensor([[5, 9, 11, 3, 8]])
    with base.using_attention(base.own_attention), torch.no_grad():
        torch.testing.assert_close(base.model(token).logits, model(token).logits, rtol=1e-5, atol=1e-5)


def test_fp8_scales_of_another_block_size_are_refused() -> None:
    with pytest.raises(ModelError, match="do not fit a weight of"):
        build("fp8_block", torch.float32, weight_block_size=[128, 128])


def test_int8_activations_get_a_word() -> None:
    config, _, _ = read("compressed_int_8_channel")
    reader = reader_for(config)
    assert reader is not None
    assert "activations in full precision" in str(reader.notice)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "quip"}, "it reads .*aqlm, awq, .*storage: nf4"),
        ({"quant_method": "eetq", "weights": "int4"}, "weights is 'int4'; lowrank reads 'int8' of eetq"),
        ({"quant_method": "gptq", "bits": 5}, "bits is 5; lowrank reads 2, 3, 4, 8"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv_fast"}, "version is 'gemv_fast'; lowrank reads 'gemm'"),
        ({"quant_method": "awq", "bits": 3}, "bits is 3"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, "Int4WeightOnly"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"axis": 0}}}, "axis 0"),
        ({"quant_method": "aqlm", "nbits_per_codebook": 24}, "nbits_per_codebook is 24"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mixed-precision",
                "config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}, "format": "nvfp4-pack-quantized"}},
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            "nvfp4-pack-quantized.*floats of 4 bits.*sparse-24",
        ),
    ],
)
def test_what_cannot_be_read_is_said_before_any_weight_is_loaded(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        reader_for(config)


def test_a_method_may_be_written_with_underscores() -> None:
    one, other = (reader_for({"quant_method": f"compressed{mark}tensors"}) for mark in "-_")
    assert one is not None
    assert type(one) is type(other)


def test_a_plain_checkpoint_has_no_reader() -> None:
    assert reader_for(None) is None
    assert reader_for({}) is None

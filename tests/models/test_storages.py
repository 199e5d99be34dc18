"""Every storage, found by its file: the gradient is right whatever the layer has been through, and so is the size."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.gradient_check import TOLERANCE, gradient_errors
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.errors import ConfigError
from lowrank.models.config import ModelConfig
from lowrank.models.loading.quantize_on_load import pack_in_place
from lowrank.models.prequantized import reader_for
from lowrank.models.storages import eetq, nf4
from lowrank.models.storages.dense import DenseConfig
from lowrank.settings import configs_in
from tests.tiny_models import make_base, make_engine, random_step
from tests.train.test_isolation import assert_same, train

STORAGES = configs_in("lowrank.models.storages")
CASES: dict[str, Any] = {name: kind() for name, kind in STORAGES.items()} | {
    "nf4 single": nf4.NF4Config(double_quant=False),
    "nf4 blocks of 128": nf4.NF4Config(block_size=128),
    "int8 with outliers": STORAGES["int8"](outlier_columns=3),  # type: ignore[call-arg]
}
SHAPES = [(48, 64), (31, 50), (7, 33), (1, 5)]
CPU = torch.device("cpu")


def linear(out_features: int, in_features: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(out_features)
    return nn.Linear(in_features, out_features, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_canary(case: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    config = CASES[case]
    layer = config.wrap(linear(*shape, dtype))
    other = config.wrap(linear(shape[0] + 5, shape[1] + 3, dtype))
    errors = gradient_errors(layer, other, dtype, CPU)
    assert {name: error for name, error in errors.items() if not error < TOLERANCE[dtype]} == {}


@pytest.mark.parametrize("case", [*CASES, *(f"hqq {bits}" for bits in (8, 6, 5, 3, 2, 1))])
@pytest.mark.parametrize("shape", [*SHAPES, (130, 300)], ids=str)
def test_bytes_are_known_from_the_shape(case: str, shape: tuple[int, int]) -> None:
    """What the memory plan counts with, before any weight is read."""
    config = CASES[case] if case in CASES else STORAGES["hqq"].model_validate({"bits": int(case[4:])})
    layer = config.wrap(linear(*shape, torch.bfloat16, bias=False))
    kept = sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
    assert config.bytes_of(shape, 2) == kept  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", CASES)
def test_canary_after_save_and_load(case: str, tmp_path: Path) -> None:
    config = CASES[case]
    layer = config.wrap(linear(24, 40, torch.float64))
    gradient_errors(layer, layer, torch.float64, CPU)
    save_file({name: tensor.contiguous() for name, tensor in layer.state_dict().items()}, tmp_path / "layer")
    again = copy.deepcopy(layer)
    for tensor in again.state_dict().values():
        tensor.zero_()
    again.load_state_dict(load_file(tmp_path / "layer"))
    assert torch.equal(again.dense_weight().clone(), layer.dense_weight())
    assert max(gradient_errors(again, layer, torch.float64, CPU).values()) < 1e-12


FIXTURES = Path(__file__).parent / "prequantized" / "fixtures"


@pytest.mark.parametrize("name", sorted(path.stem for path in FIXTURES.glob("*.safetensors")))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_canary_of_every_reader(name: str, dtype: torch.dtype) -> None:
    """Layers packed by the tools themselves."""
    with safe_open(str(FIXTURES / f"{name}.safetensors"), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key != "dense"}  # noqa: SIM118
        reader = reader_for(json.loads(file.metadata()["quantization_config"]))
    assert reader is not None
    layer = reader.build("layer", tensors, None, dtype)
    errors = gradient_errors(layer, CASES["nf4"].wrap(linear(96, 64, dtype)), dtype, CPU)  # type: ignore[arg-type]
    assert {name: error for name, error in errors.items() if not error < TOLERANCE[dtype]} == {}


def test_the_canary_sees_a_scratch_weight_that_was_kept() -> None:
    """What it is for: a layer that lets autograd keep its scratch gives another layer's gradient, or none."""

    class Keeps(nn.Module):
        in_features, out_features, bias = 40, 24, None
        buffer = torch.zeros(24, 40, dtype=torch.float64)

        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.own = weight

        def dense_weight(self) -> torch.Tensor:
            self.buffer.data.copy_(self.own)  # .data: autograd is not told
            return self.buffer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.dense_weight())

    layers = [Keeps(torch.randn(24, 40, dtype=torch.float64)) for _ in range(2)]
    errors = gradient_errors(layers[0], layers[1], torch.float64, CPU)  # type: ignore[arg-type]
    assert errors["trained"] < 1e-12  # the routed linear keeps nothing
    assert errors["without adapters"] > 0.1


def test_a_kept_scratch_weight_is_refused_by_autograd() -> None:
    layer = CASES["nf4"].wrap(linear(24, 40, torch.float32))
    x = torch.randn(3, 40, requires_grad=True)
    y = nn.functional.linear(x, layer.dense_weight())  # somebody else's code
    layer.dense_weight()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("case", CASES)
def test_conv1d_and_bias(case: str) -> None:
    """GPT-2 keeps its weight as (D, O)."""
    plain = linear(24, 40, torch.float32)
    conv = Conv1D(24, 40).requires_grad_(False)
    conv.weight.copy_(plain.weight.t())
    conv.bias.copy_(plain.bias)
    one, other = CASES[case].wrap(plain), CASES[case].wrap(conv)
    assert (other.out_features, other.in_features) == (24, 40)
    assert torch.equal(one.dense_weight().clone(), other.dense_weight())
    x = torch.randn(3, 40)
    torch.testing.assert_close(other(x), one(x))


def bits(layer: nn.Module, numel: int) -> float:
    return 8 * sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values()) / numel


@pytest.mark.parametrize(
    ("case", "expected_bits", "expected_error"),
    [("nf4", 4.127, 0.0920), ("nf4 single", 4.5, 0.0920), ("fp4", 4.127, 0.1219), ("int8", 8.03, 0.0083)],
)
def test_bits_and_error(case: str, expected_bits: float, expected_error: float, tmp_path: Path) -> None:
    """In memory, on disk, and what rounding costs on normal weights (2048 x 2048, N(0, 1))."""
    torch.manual_seed(0)
    size = 2048
    plain = nn.Linear(size, size, bias=False).requires_grad_(False)
    nn.init.normal_(plain.weight)
    layer = CASES[case].wrap(plain)
    assert bits(layer, size * size) == pytest.approx(expected_bits, abs=2e-2 if case == "int8" else 5e-4)
    save_file(dict(layer.state_dict()), tmp_path / "layer")
    assert 8 * (tmp_path / "layer").stat().st_size / size**2 == pytest.approx(expected_bits, abs=2e-2)
    error = (layer.dense_weight() - plain.weight).norm() / plain.weight.norm()
    assert error.item() == pytest.approx(expected_error, abs=5e-4)


@pytest.mark.parametrize("case", [case for case in CASES if case != "dense"])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 257)], ids=str)
def test_the_planner_knows_the_bytes(case: str, shape: tuple[int, int]) -> None:
    layer = CASES[case].wrap(linear(*shape, torch.bfloat16, bias=False))
    kept = sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())
    assert CASES[case].bytes_of(shape, itemsize=2) == kept


def test_outlier_columns_are_as_they_were() -> None:
    plain = linear(24, 40, torch.float32)
    plain.weight[:, 7] *= 50
    with_outliers = CASES["int8 with outliers"].wrap(plain)
    assert torch.equal(with_outliers.dense_weight()[:, 7], plain.weight[:, 7])

    def rest(layer: Any) -> float:
        difference = (layer.dense_weight() - plain.weight).abs()
        difference[:, 7] = 0
        return difference.max().item()

    assert rest(with_outliers) < rest(CASES["int8"].wrap(plain)) / 10


@pytest.mark.parametrize("case", ["nf4", "fp4", "int8"])
def test_training_on_it_holds_what_is_promised(case: str) -> None:
    """Beside another job, in another slot, after evaluations: the same losses and weights, to rounding."""
    adapter = LoraConfig(rank=4, dropout=0.3)

    def engine(*more: Any) -> Any:
        base = make_base("llama")
        pack_in_place(base.model, CASES[case])
        return make_engine(base, adapter, *more)

    alone, (slot,) = engine()
    expected = train(alone, slot)
    together, (a, b) = engine(LoraConfig(rank=2))
    assert_same(train(together, a, {b: lambda step: random_step(step, [20, 6])}), expected)
    evaluated, (slot,) = engine()
    losses: list[float] = []
    for step in range(4):
        losses += train(evaluated, slot, steps=range(step, step + 1))[0]
        evaluated.evaluate({slot: random_step(1, [30, 4])})
    assert losses == expected[0]


def test_equals_training_on_the_dequantized_base() -> None:
    """The whole model's gradient, not one layer's."""
    packed, dense = make_base("llama"), make_base("llama")
    pack_in_place(packed.model, CASES["nf4"])
    for name, module in packed.model.named_modules():
        if hasattr(module, "dense_weight"):
            dense.model.get_submodule(name).weight.copy_(module.dense_weight())
    one, (slot,) = make_engine(packed, LoraConfig(rank=4))
    other, _ = make_engine(dense, LoraConfig(rank=4))
    assert_same(train(one, slot), train(other, slot))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="block_size"):
        ModelConfig(path="x", storage={"type": "nf4", "block_size": 60})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there is no type 'nf5'; did you mean 'nf4'"):
        ModelConfig(path="x", storage={"type": "nf5"})  # type: ignore[arg-type]
    assert isinstance(ModelConfig(path="x").storage, DenseConfig)


def test_bf16_under_float32_keeps_every_value_of_a_bf16_checkpoint() -> None:
    linear_OD = linear(48, 64, torch.bfloat16)
    layer = STORAGES["bf16"]().wrap(copy.deepcopy(linear_OD).float())
    assert layer.narrow.dtype == torch.bfloat16
    assert layer.dense_weight().dtype == torch.float32
    assert torch.equal(layer.dense_weight(), linear_OD.weight.float())
    x_TD = torch.randn(5, 64)
    assert torch.equal(layer(x_TD), nn.functional.linear(x_TD, linear_OD.weight.float(), linear_OD.bias.float()))


def test_eetq_quantizes_as_eetq_does() -> None:
    """Codes and scales that EETQ's own `symmetric_quantize` gave (tests/models/prequantized/make_fixtures.py)."""
    theirs = load_file(Path(__file__).parent / "eetq_quantized.safetensors")
    code_OD, scale_O1 = eetq.quantize(theirs["weight"])
    assert torch.equal(code_OD.to(torch.int16) - 128, theirs["code"].to(torch.int16))
    assert torch.equal(scale_O1[:, 0], theirs["scale"])
    empty, _ = eetq.quantize(torch.zeros(2, 3))
    assert (empty == 128).all()

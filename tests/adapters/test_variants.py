"""The contract of adapter variants. A new file in adapters/variants/ or models/storages/ is tested by being there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.linear import LayerAdapter, RoutedLinear
from lowrank.adapters.routing import ForwardContext, RngKey, Routing
from lowrank.adapters.variants.base import BiasMerge, OutputGain, TrainingHooks, Variant
from lowrank.kernels.counter_random import dropout
from lowrank.models.storages import BaseLinear
from lowrank.settings import configs_in
from tests.adapters.peft_twins import VARIANTS as OF_LAYERS
from tests.adapters.variant_cases import LOSSY, TYPE, GainConfig, RoundedConfig
from tests.tiny_models import make_base, make_engine, random_step

VARIANTS: dict[str, Any] = {**OF_LAYERS, TYPE: GainConfig}
STORAGES: dict[str, Any] = {**configs_in("lowrank.models.storages"), LOSSY: RoundedConfig}
BUILT_IN = [name for name in VARIANTS if name != TYPE]
LIKE_LORA = [name for name in BUILT_IN if VARIANTS[name].peft_fields is not None and VARIANTS[name].peft.type == "LORA"]
RANK, ALPHA, D, O = 4, 6.0, 64, 48  # noqa: E741 (the letters of batches.py)

on_dense = pytest.mark.parametrize("name", [name for name in VARIANTS if not VARIANTS[name].needs_quantized])
every_variant = pytest.mark.parametrize("name", VARIANTS)
LAYERS = ("linear", "conv1d", "no bias")


def on_storages(every_pair: bool = False) -> pytest.MarkDecorator:
    """Every variant on every storage and kind of layer, of which only some are not slow.

    Those are each variant on the three dense layers, on the storage that loses most and on one that packs (or, with
    `every_pair`, on each), the kind of layer taking turns.
    """
    storages = list(STORAGES)
    cases = []
    for variant_number, name in enumerate(VARIANTS):
        packed = [each for each in storages if each not in ("dense", LOSSY)]
        daily = storages if every_pair else ["dense", LOSSY, packed[variant_number % len(packed)]]
        for number, storage in enumerate(storages):
            for layer_number, layer in enumerate(LAYERS):
                its_turn = storage == "dense" or layer_number == (variant_number + number) % len(LAYERS)
                marks = () if storage in daily and its_turn else pytest.mark.slow
                cases.append(pytest.param(name, (storage, layer), marks=marks, id=f"{name}-{storage} {layer}"))
    return pytest.mark.parametrize(("name", "base"), cases, indirect=["base"])


@pytest.fixture
def base(request: pytest.FixtureRequest) -> Any:
    """A frozen layer in every storage."""
    storage, layer = request.param
    torch.manual_seed(0)
    linear: nn.Module = Conv1D(O, D) if layer == "conv1d" else nn.Linear(D, O, bias=layer == "linear")
    for parameter in linear.parameters():
        nn.init.normal_(parameter, std=0.3)
    return STORAGES[storage]().wrap(linear.double().requires_grad_(False))


def settings_for(name: str, **settings: Any) -> Any:
    """The variant's settings for the layers of these tests: OFT's blocks must divide 48, some know no dropout."""
    own = {
        "rank": RANK,
        "alpha": ALPHA,
        **({"block_size": 8} if "block_size" in VARIANTS[name].model_fields else {}),
        **settings,
    }
    return VARIANTS[name](**{key: value for key, value in own.items() if key not in VARIANTS[name].refused})


def fresh(name: str, base: BaseLinear, moved: float = 0.0, seed: int = 0) -> tuple[Any, float, dict[str, torch.Tensor]]:
    """(variant, scale, masters), the trained ones moved away from the start by random numbers of size `moved`."""
    variant = settings_for(name).build()
    scale = variant.scale(RANK, ALPHA)
    generator = torch.Generator().manual_seed(seed)
    start = variant.init(base, RANK, scale, generator)
    masters: dict[str, torch.Tensor] = {}
    for key, tensor in start.items():
        assert tensor.dtype in (torch.float32, torch.float64)
        if key in variant.frozen:
            masters[key] = tensor.double()
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        masters[key] = nn.Parameter(tensor.double() + moved * noise)
    if isinstance(variant, TrainingHooks):
        variant.refresh(base, scale, masters)
    return variant, scale, masters


def trained(masters: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in masters.values() if tensor.requires_grad]


def routed(base: BaseLinear, *slots: tuple[int, int, Any], rate: float = 0.0) -> RoutedLinear:
    """A routed linear; `slots` are (first row, end row, what `fresh` gave)."""
    routing = Routing()
    layer = RoutedLinear(base, "layer", routing)
    ranges = []
    for number, (first, end, (variant, scale, masters)) in enumerate(slots):
        layer.adapters[number] = LayerAdapter(variant, scale, masters, None, rate)
        ranges.append((number, first, end))
    rows = ranges[-1][2]
    rng_keys = {number: RngKey(seed=number, step=0) for number, _, _ in ranges}
    routing.current = ForwardContext(rows, tuple(ranges), torch.arange(rows), torch.full((rows,), rows), rng_keys)
    return layer


def inputs(rows: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _merged_bias(variant: Any, bias_O: Any, masters: dict[str, torch.Tensor]) -> Any:
    return variant.merge_bias(bias_O, masters) if isinstance(variant, BiasMerge) and bias_O is not None else bias_O


def assert_close(one: torch.Tensor, other: torch.Tensor, base: BaseLinear) -> None:
    """To rounding of the dtype the storage computes in."""
    tolerance = 1e-11 if base.dense_weight().dtype == torch.float64 else 2e-2
    torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@on_storages()
def test_starts_as_the_base(name: str, base: Any) -> None:
    """To the bit where the update is zero at the start; to rounding where parts of it cancel (HRA's reflections)."""
    x_TD = inputs(10)
    variant, scale, masters = fresh(name, base)
    started, plain = routed(base, (0, 10, (variant, scale, masters)))(x_TD).detach(), base(x_TD)
    weight_OD = base.dense_weight().clone()
    if torch.equal(variant.merge(weight_OD, scale, masters), weight_OD.to(x_TD.dtype)):
        assert torch.equal(started, plain)
    else:
        limit = 32 * torch.finfo(weight_OD.dtype).eps * float(plain.abs().max())
        assert float((started - plain).abs().max()) < limit


@on_storages()
def test_merged_applied_and_routed_are_the_same(name: str, base: Any) -> None:
    x_TD = inputs(10)
    variant, scale, masters = fresh(name, base, moved=0.3)
    weight_OD = base.dense_weight().clone()
    merged_bias = _merged_bias(variant, base.bias, masters)
    merged = F.linear(x_TD, variant.merge(weight_OD, scale, masters).to(x_TD.dtype), merged_bias)
    assert torch.equal(base.dense_weight(), weight_OD), "merge changed the base"
    applied = variant.apply(x_TD, base(x_TD), base, scale, masters)
    assert_close(applied, merged, base)
    assert_close(routed(base, (0, 10, (variant, scale, masters)))(x_TD), applied, base)
    assert (merged - base(x_TD)).norm() > 0.05 * base(x_TD).norm()


@on_storages()
def test_low_rank_if_it_says_so(name: str, base: Any) -> None:
    variant, scale, masters = fresh(name, base, moved=0.3)
    low_rank = variant.as_low_rank(masters)
    if low_rank is None:
        assert type(variant).apply is not Variant.apply
        assert type(variant).merge is not Variant.merge
        return
    A_RD, B_OR = low_rank
    rank = settings_for(name).as_saved().rank
    assert (A_RD.shape, B_OR.shape) == ((rank, D), (O, rank))
    if isinstance(variant, OutputGain):
        return
    x_TD = inputs(10)
    updated_TO = base(x_TD) + scale * x_TD @ A_RD.t() @ B_OR.t()
    assert_close(updated_TO, variant.apply(x_TD, base(x_TD), base, scale, masters), base)


@on_storages(every_pair=True)
@pytest.mark.parametrize("rate", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_gradients_are_those_of_apply(name: str, base: Any, rate: float) -> None:
    """And dropout reaches every variant: `apply` gets the dropped-out input, the base the whole one."""
    variant, scale, masters = fresh(name, base, moved=0.3)
    x_TD = inputs(10).requires_grad_()
    layer = routed(base, (0, 10, (variant, scale, masters)), rate=rate)
    wanted = [x_TD, *trained(masters)]
    key = layer.routing.current.key(0, "layer")
    assert key is not None
    dropped = dropout(x_TD, torch.arange(10), key, rate)
    y_TO = F.linear(x_TD, base.dense_weight().clone(), base.bias)  # no scratch, no Function of ours
    expected = variant.apply(dropped, y_TO, base, scale, masters)
    ours = layer(x_TD)
    assert_close(ours, expected, base)
    outer = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for one, other in zip(torch.autograd.grad(ours, wanted, outer), torch.autograd.grad(expected, wanted, outer)):
        assert one.any(), "an input or a trained tensor without a gradient"
        assert_close(one, other, base)


@on_storages()
def test_alone_or_one_of_three(name: str, base: Any) -> None:
    """N=1 equals slot k of N=3, of other variants and itself; dropout on, outputs and gradients."""
    mine = fresh(name, base, moved=0.3)
    x_TD = inputs(10)
    others = [fresh(other, base, moved=0.5, seed=9) for other in ("lora", TYPE)]
    outcomes = []
    for neighbors in (False, True):
        own = x_TD.clone().requires_grad_()
        slots = [(0, 4, others[0]), (4, 14, mine), (14, 17, others[1])] if neighbors else [(0, 10, mine)]
        layer = routed(base, *slots)
        rows = torch.cat([inputs(4, 1), own, inputs(3, 2)]) if neighbors else own
        y_TO = layer(rows)[4:14] if neighbors else layer(rows)
        gradients = torch.autograd.grad((y_TO**3).sum(), [own, *trained(mine[2])])
        outcomes.append((y_TO, *gradients))
    for one, other in zip(*outcomes):
        assert_close(one, other, base)


@every_variant
def test_settings_are_documented(name: str) -> None:
    config = VARIANTS[name]
    assert config.__doc__
    for field, info in config.model_fields.items():
        assert field == "type" or info.description, field
    assert config().build().scale(8, 16.0) > 0
    assert name == TYPE or (config.paper and config.when)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("name", LIKE_LORA)
def test_peft_computes_the_same_from_the_same_tensors(name: str) -> None:
    """Scale included: PEFT gets rank, alpha and `peft_fields`, nothing else."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, O)).double()
    base = STORAGES["dense"]().wrap(model[0].requires_grad_(False))
    variant, scale, masters = fresh(name, base, moved=0.3)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["0"], **VARIANTS[name].peft_fields}
    twin = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False).eval()
    own = {
        key.removeprefix("base_model.model.0.").replace(".default", "").removesuffix(".weight"): parameter
        for key, parameter in twin.named_parameters()
        if parameter.requires_grad
    }
    assert own.keys() == {key for key, tensor in masters.items() if tensor.requires_grad}
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(masters[key])
    x_TD = inputs(10)
    layer = routed(base, (0, 10, (variant, scale, masters)))
    torch.testing.assert_close(layer(x_TD), twin(x_TD), rtol=1e-12, atol=1e-12)
    merged = variant.merge(base.dense_weight(), scale, masters)
    twin.merge_adapter()  # in place, and the weight is the same object
    torch.testing.assert_close(merged, twin.base_model.model[0].base_layer.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LIKE_LORA)
def test_starts_like_peft(name: str) -> None:
    """Same distribution of the initial values: bounds and spread of every tensor."""
    model = nn.Sequential(nn.Linear(512, 384))
    base = STORAGES["dense"]().wrap(model[0])
    variant = VARIANTS[name]().build()
    start = variant.init(base, 32, 1.0, torch.Generator().manual_seed(0))
    settings = {"r": 32, "target_modules": ["0"], **VARIANTS[name].peft_fields}
    twin = get_peft_model(model, LoraConfig(**settings))
    for key in start.keys() - variant.frozen:
        ours = start[key]
        theirs = next(parameter for full, parameter in twin.named_parameters() if f".{key}." in full)
        assert ours.shape == theirs.shape
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05, abs=1e-9)
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.02, abs=1e-9)


@on_dense
def test_small_updates_survive_under_a_bfloat16_base(name: str) -> None:
    """Masters are float32: 200 updates of 5e-6 add up to 1e-3, though bfloat16 cannot see one of them."""
    config: AdapterSettings = settings_for(name)
    engine, (slot,) = make_engine(make_base("llama", torch.bfloat16), config, type="sgd", max_grad_norm=None)
    parameters = engine.bank.parameters(slot)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(0.5)
    for _ in range(200):
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        engine.optim_step(slot, 5e-6)
    for parameter in parameters.values():
        assert parameter.mean().item() == pytest.approx(0.499, abs=2e-5)
    layer = next(iter(engine.bank.slots[slot].layers.values()))
    if layer.compute_dtype_weights is not None:
        for copied, master in zip(layer.compute_dtype_weights, layer.variant.as_low_rank(layer.masters) or ()):
            assert copied.dtype == torch.bfloat16
            assert torch.equal(copied, master.bfloat16())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if dtype == torch.bfloat16 or name in ("lora", "oft") else pytest.mark.slow)
        for name in VARIANTS
        if not VARIANTS[name].needs_quantized
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ],
)
def test_trains_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    """The loss of one step taken over and over falls, and gradients arrive in the masters' dtype. What has few
    parameters may need the higher learning rate."""
    assert any(_learns(name, dtype, learning_rate) for learning_rate in (2e-2, 0.1))


def _learns(name: str, dtype: torch.dtype, learning_rate: float) -> bool:
    engine, (slot,) = make_engine(make_base("llama", dtype), settings_for(name, dropout=0.1))
    work = {slot: random_step(0, [12, 20])}
    losses = []
    for _ in range(12):
        losses.append(engine.forward_backward(work)[slot].loss)
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in engine.bank.parameters(slot).values())
        updated = engine.optim_step(slot, learning_rate)
        assert not updated.skipped or updated.loss_scale is not None  # float16 finds its scale first
    assert math.isfinite(losses[-1])
    return min(losses[-3:]) < losses[0] - 0.05

"""Products in few shapes: the same numbers, nobody else's, and few shapes indeed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowrank.adapters.linear import LayerAdapter, RoutedLinear
from lowrank.adapters.routing import ForwardContext, RngKey, Routing
from lowrank.adapters.variants.lora import Lora as Variant
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import BASE_SLOT, pack
from lowrank.kernels.shape_bucketing import bucketed_rows, row_bucket
from lowrank.models.storages.dense import DenseLinear
from tests.products import Products
from tests.tiny_models import make_base, make_engine, random_step

BF16 = torch.bfloat16
RANGES = ((0, 3, 40), (1, 40, 41), (2, 41, 90))
NUM_ROWS = 96


def test_numbers_of_rows_are_few_and_not_much_larger() -> None:
    rounded = [bucketed_rows(rows) for rows in range(1, 513)]
    assert all(rows <= found <= max(rows * 1.5, rows + 31) for rows, found in enumerate(rounded, 1))
    assert rounded == sorted(rounded)
    assert len(set(rounded)) == 26
    assert all(bucketed_rows(found) == found for found in rounded)
    assert (bucketed_rows(2048), bucketed_rows(2049), bucketed_rows(4000)) == (2048, 2112, 4032)


@pytest.mark.parametrize(("first", "end"), [(0, 33), (10, 59), (60, 96), (95, 96), (0, 96)])
def test_a_window_has_the_rows_and_lies_within(first: int, end: int) -> None:
    found = row_bucket(torch.zeros(NUM_ROWS, 2, dtype=BF16), first, end)
    assert 0 <= found.start <= first < end <= found.stop <= NUM_ROWS
    assert found.stop - found.start == bucketed_rows(end - first)
    assert list(range(NUM_ROWS))[found.rows][found.inside] == list(range(first, end))
    assert row_bucket(torch.zeros(NUM_ROWS, 2), first, end).is_exact  # float32 is not compiled for its shape
    alone = row_bucket(torch.zeros(end, 2, dtype=BF16), 0, end)  # no rows beside: as it is
    assert alone.is_exact


def routed(dropout: float, broken: int | None = None) -> tuple[RoutedLinear, torch.Tensor]:
    """A layer with three slots and their input; the rows of one slot are not finite."""
    torch.manual_seed(0)
    routing = Routing()
    plain = nn.Linear(24, 40).requires_grad_(False).to(BF16)
    layer = RoutedLinear(DenseLinear(plain), "layer", routing)
    for slot, _, _ in RANGES:
        A_RD, B_OR = torch.randn(4, 24), torch.randn(40, 4)
        masters: dict[str, torch.Tensor] = {"lora_A": nn.Parameter(A_RD), "lora_B": nn.Parameter(B_OR)}
        layer.adapters[slot] = LayerAdapter(Variant(), 0.5, masters, (A_RD.to(BF16), B_OR.to(BF16)), dropout)
    x_TD = torch.randn(NUM_ROWS, 24).to(BF16)
    if broken is not None:
        x_TD[slice(*RANGES[broken][1:])] = float("nan")
        for copy in layer.adapters[broken].compute_dtype_weights or ():
            copy.fill_(float("inf"))
    rng_keys = {slot: RngKey(seed=slot, step=1) for slot, _, _ in RANGES}
    length_N = torch.full((NUM_ROWS,), NUM_ROWS)
    routing.current = ForwardContext(NUM_ROWS, RANGES, torch.arange(NUM_ROWS), length_N, rng_keys)
    return layer, x_TD.requires_grad_()


def results(layer: RoutedLinear, x_TD: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """What each slot has of a forward and a backward pass."""
    generator = torch.Generator().manual_seed(1)
    y_TO = layer(x_TD)
    (y_TO * torch.randn(NUM_ROWS, 40, generator=generator).to(BF16)).sum().backward()
    assert x_TD.grad is not None
    found = []
    for slot, first, end in RANGES:
        masters: Any = layer.adapters[slot].masters
        gradients = {name: value.grad for name, value in masters.items()}
        found.append({"y": y_TO[first:end].detach(), "dx": x_TD.grad[first:end], **gradients})
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_numbers_are_those_of_exact_products(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = results(*routed(dropout))
    monkeypatch.setattr("lowrank.kernels.shape_bucketing.needs_bucketing", lambda *_: False)
    for own, exact in zip(ours, results(*routed(dropout))):
        for name, value in exact.items():
            error = (own[name].float() - value.float()).norm() / value.float().norm()
            assert error < 5e-3, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_what_is_not_finite_stays_with_its_slot(dropout: float, broken: int) -> None:
    """Windows reach into the neighbors' rows; to the bit nothing comes of it."""
    healthy, beside = results(*routed(dropout)), results(*routed(dropout, broken))
    assert not beside[broken]["y"].isfinite().any()
    for slot, (own, other) in enumerate(zip(healthy, beside)):
        if slot != broken:
            for name in ("y", "dx"):
                assert torch.equal(own[name], other[name]), name
            for name in ("lora_A", "lora_B"):  # computed again without the neighbors, so in another shape
                torch.testing.assert_close(own[name], other[name], rtol=2e-2, atol=2e-2)


def test_steps_of_many_lengths_compile_few_products() -> None:
    engine, slots = make_engine(make_base("qwen2", BF16), LoraConfig(rank=4), LoraConfig(rank=4))
    products, counts = Products(), []
    for step, length in enumerate(range(33, 63, 2)):
        work = {slot: random_step(step, [length + 2 * slot]) for slot in slots}
        with products:
            engine.forward_backward(work)
        for slot in slots:
            engine.optim_step(slot, 1e-3)
        counts.append(len(products.seen))
    assert counts[-1] <= 3 * counts[0], counts  # as they come, each of the 15 numbers of rows has its own


def test_a_filler_is_a_document_of_its_own() -> None:
    base = make_base("qwen2", BF16)
    batch = pack([(BASE_SLOT, segment) for segment in random_step(0, [21, 50])])
    filled = base.filled(batch)
    assert filled.num_tokens == 71
    assert base.rows(filled).num_rows == 96
    whole, plain = base.hidden(filled), base.hidden(batch)
    assert whole.shape == plain.shape
    torch.testing.assert_close(whole, plain, rtol=2e-2, atol=2e-2)
    in_float32 = make_base("qwen2", torch.float32)
    assert in_float32.filled(batch).filler == 0

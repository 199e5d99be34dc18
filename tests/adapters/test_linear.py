"""The autograd Function itself, and the grouped back-end against the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowrank.adapters.linear import LayerAdapter, RoutedLinear
from lowrank.adapters.lora_function import SlotUpdate, routed_product
from lowrank.adapters.output_gain import Gain, apply_gains
from lowrank.adapters.routing import ForwardContext, RngKey, Routing
from lowrank.adapters.variants.lora import Lora
from lowrank.kernels.grouped import can_group, grouped_backward, grouped_forward
from lowrank.models.storages.dense import DenseLinear

RANKS = (4, 1, 6)
RANGES = ((0, 2, 7), (1, 7, 8), (3, 8, 14))


def make_layer(dropout: float, bias: bool = True) -> RoutedLinear:
    """Rows 0-1 are the bare base, slot 2 is absent; ranks are mixed."""
    torch.manual_seed(0)
    routing = Routing()
    layer = RoutedLinear(DenseLinear(nn.Linear(5, 7, bias=bias).double().requires_grad_(False)), "layer", routing)
    for (slot, _, _), rank in zip(RANGES, RANKS):
        masters = {
            "lora_A": nn.Parameter(torch.randn(rank, 5, dtype=torch.float64)),
            "lora_B": nn.Parameter(torch.randn(7, rank, dtype=torch.float64)),
        }
        layer.adapters[slot] = LayerAdapter(Lora(), 0.5 + slot, masters, None, dropout)
    rng_keys = {slot: RngKey(seed=slot, step=3) for slot, _, _ in RANGES}
    routing.current = ForwardContext(14, RANGES, torch.arange(14), torch.full((14,), 14), rng_keys)
    return layer


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(dropout: float, bias: bool) -> None:
    layer = make_layer(dropout, bias)
    x_TD = torch.randn(14, 5, dtype=torch.float64, requires_grad=True)
    masters = [tensor for adapter in layer.adapters.values() for tensor in adapter.masters.values()]
    # gradcheck moves one element of x, A, B at a time; the layer reads the moved tensors
    assert torch.autograd.gradcheck(lambda *_: layer(x_TD), (x_TD, *masters))


def test_equals_the_formula_with_the_mask_written_out() -> None:
    layer = make_layer(0.4)
    x_TD = torch.randn(14, 5, dtype=torch.float64)
    expected = layer.base(x_TD)
    for slot, first, end in RANGES:
        adapter = layer.adapters[slot]
        key = layer.routing.current.key(slot, "layer")
        assert key is not None
        update = SlotUpdate(first, end, 1.0, x_TD, x_TD, 0.4, key, torch.arange(14))
        mask_TD = update.drop(torch.ones(end - first, 5, dtype=torch.float64), slice(first, end))
        assert 0 < (mask_TD == 0).float().mean() < 1
        A_RD, B_OR = adapter.masters["lora_A"], adapter.masters["lora_B"]
        expected[first:end] += adapter.scale * (x_TD[first:end] * mask_TD) @ A_RD.t() @ B_OR.t()
    torch.testing.assert_close(layer(x_TD), expected)


def test_saves_the_input_itself_and_no_weight() -> None:
    """What is kept for the backward pass: x (the same storage), and T x R per slot."""
    layer = make_layer(0.0)
    x_TD = torch.randn(14, 5, dtype=torch.float64, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x_TD)
    assert saved[0].data_ptr() == x_TD.data_ptr()
    assert sum(tensor.numel() for tensor in saved[1:]) == sum((end - a) * r for (_, a, end), r in zip(RANGES, RANKS))


def test_grouped_equals_the_loop() -> None:
    """bf16, ranks that are no multiple of 8, bare-base rows in front: kernels/grouped.py against the plain loop."""
    torch.manual_seed(0)
    x_TD = torch.randn(60, 16).bfloat16()
    updates = tuple(
        SlotUpdate(5 + 11 * i, 5 + 11 * (i + 1), 0.5 + i, torch.randn(r, 16).bfloat16(), torch.randn(24, r).bfloat16())
        for i, r in enumerate((4, 8, 3, 16, 1))
    )
    assert can_group(x_TD, updates)
    base = DenseLinear(nn.Linear(16, 24).bfloat16().requires_grad_(False))
    loop_input = x_TD.clone().requires_grad_()
    masters = [tensor.float().requires_grad_() for update in updates for tensor in (update.A_RD, update.B_OR)]
    loop = routed_product(loop_input, base, updates, masters)
    y_TO = base(x_TD)
    (h_TR,) = grouped_forward(x_TD, y_TO, updates)
    torch.testing.assert_close(y_TO, loop, rtol=3e-2, atol=0.3)
    dy_TO = torch.randn(60, 24).bfloat16()
    loop.backward(dy_TO)
    dx_TD = dy_TO @ base.dense_weight()
    gradients = grouped_backward(dy_TO, x_TD, h_TR, dx_TD, updates)
    assert loop_input.grad is not None
    assert _relative(dx_TD, loop_input.grad) < 1e-2
    for gradient, master in zip(gradients, masters):
        assert master.grad is not None
        assert _relative(gradient, master.grad) < 1e-2


def test_groups_have_no_rows_of_others_between_them() -> None:
    """A slot without an adapter here, or with one that is no low-rank update, leaves a gap: its rows would be taken for
    the next slot's."""
    x_TD = torch.randn(60, 16).bfloat16()
    A_RD, B_OR = torch.randn(8, 16).bfloat16(), torch.randn(24, 8).bfloat16()
    updates = [SlotUpdate(10 * i, 10 * (i + 1), 1.0, A_RD, B_OR) for i in range(6)]
    assert can_group(x_TD, updates)
    assert not can_group(x_TD, [*updates[:2], *updates[3:]])


@pytest.mark.parametrize("bias", [True, False])
def test_gains_on_the_rows_of_some(bias: bool) -> None:
    """The formula with plain autograd; a gain of one changes no bit; rows of others pass as they are."""
    torch.manual_seed(0)
    y_TO, bias_O = torch.randn(9, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64) if bias else None
    masters = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    rows = ((1, 4), (6, 9))
    wanted = [y_TO.clone().requires_grad_(), *masters]

    def by_function(y_TO: torch.Tensor, *excesses: torch.Tensor) -> torch.Tensor:
        gains = [Gain(*own, excess_O.detach()) for own, excess_O in zip(rows, excesses)]
        return apply_gains(y_TO + 0, bias_O, gains, excesses)

    expected_TO = wanted[0] + 0
    for (first, end), excess_O in zip(rows, masters):
        plain_PO = wanted[0][first:end] - (0 if bias_O is None else bias_O)
        expected_TO[first:end] = plain_PO * (1 + excess_O) + (0 if bias_O is None else bias_O)
    torch.testing.assert_close(by_function(*wanted), expected_TO)
    outer_TO = torch.randn(9, 4, dtype=torch.float64)
    ours = torch.autograd.grad(by_function(*wanted), wanted, outer_TO)
    for one, other in zip(ours, torch.autograd.grad(expected_TO, wanted, outer_TO)):
        torch.testing.assert_close(one, other)
    assert torch.equal(ours[0][4:6], outer_TO[4:6])
    assert torch.equal(by_function(y_TO, *(torch.zeros(4, dtype=torch.float64),) * 2), y_TO)


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def test_the_input_is_kept_only_where_some_A_is_trained() -> None:
    """LoRA-FA: the backward pass needs x A^T alone."""
    for trains_A in (True, False):
        layer = make_layer(0.4)
        for adapter in layer.adapters.values():
            adapter.masters["lora_A"].requires_grad_(trains_A)
        x_TD = torch.randn(14, 5, dtype=torch.float64, requires_grad=True)
        masters = list(layer.adapters[0].masters.values())
        update = SlotUpdate(2, 7, 1.0, masters[0].detach(), masters[1].detach())
        function: Any = routed_product(x_TD, layer.base, [update], masters)
        assert any(kept is x_TD for kept in function.grad_fn.saved_tensors) == trains_A

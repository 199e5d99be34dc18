"""Updates of many slots at once give what each slot's own products give, whatever rows each has."""

from __future__ import annotations

import pytest
import torch

from lowrank.kernels.decode_lora import Stack, add_updates, add_updates_by_row, add_updates_of_rows, stack

IN, OUT = 24, 40


def random_stack(ranks: list[int], scales: list[float], dtype: torch.dtype) -> tuple[Stack, list[torch.Tensor]]:
    """And each slot's scale * B A, in float64."""
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (
            torch.randn(rank, IN, generator=generator).to(dtype),
            torch.randn(OUT, rank, generator=generator).to(dtype),
        )
        for rank in ranks
    ]
    products = [scale * (B_OR.double() @ A_RD.double()) for (A_RD, B_OR), scale in zip(pairs, scales)]
    return stack(pairs, scales), products


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [[2.0] * 5, [2.0, 0.5, 1.0, 1.5, -1.0]])
@pytest.mark.parametrize("ranks", [[4] * 5, [1, 8, 4, 2, 16]])
@pytest.mark.parametrize(
    "ranges",
    [
        ((2, 4), (4, 6), (6, 8), (8, 10), (10, 12)),
        ((1, 2), (2, 5), (5, 6), (6, 8), (8, 11)),
        ((0, 3), (4, 6), (6, 7), (9, 12), (12, 13)),
        ((0, 1), (1, 2), (2, 3), (3, 4)),
        ((0, 70), (70, 71), (71, 75)),
        ((0, 40), (43, 75)),
        ((0, 75),),
        ((74, 75),),
    ],
)
def test_equals_each_slots_own_products(
    dtype: torch.dtype, scales: list[float], ranks: list[int], ranges: tuple[tuple[int, int], ...]
) -> None:
    stacked, products = random_stack(ranks[: len(ranges)], scales[: len(ranges)], dtype)
    x_TD, y_TO = torch.randn(75, IN).to(dtype), torch.randn(75, OUT).to(dtype)
    expected_TO = y_TO.double()
    for (first, end), product_OD in zip(ranges, products):
        expected_TO[first:end] += x_TD[first:end].double() @ product_OD.t()
    group_T = torch.full((75,), -1)
    for group, (first, end) in enumerate(ranges):
        group_T[first:end] = group
    scale_G = torch.tensor(stacked.scales)
    given = stacked.A_GRD, stacked.B_GOR, scale_G, group_T
    by_row_TO, of_rows_TO = y_TO.clone(), y_TO.clone()
    add_updates(x_TD, y_TO, stacked, ranges)
    add_updates_by_row(by_row_TO, x_TD, *given)
    add_updates_of_rows(x_TD, of_rows_TO, *given)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-4, torch.bfloat16: 1.0}[dtype]
    for ours_TO in (y_TO, by_row_TO, of_rows_TO):
        torch.testing.assert_close(ours_TO.double(), expected_TO, atol=tolerance, rtol=tolerance / 10)


@pytest.mark.parametrize("ranges", [((0, 1), (1, 4), (4, 5), (5, 6), (6, 8)), ((0, 1), (1, 40), (40, 41), (41, 48))])
def test_a_slot_that_diverged_stays_by_itself(ranges: tuple[tuple[int, int], ...]) -> None:
    stacked, _ = random_stack([4] * len(ranges), [1.0] * len(ranges), torch.float32)
    stacked.A_GRD[1].fill_(float("nan"))
    x_TD, y_TO = torch.randn(48, IN), torch.zeros(48, OUT)
    last = ranges[-1][1] - 1
    x_TD[last] = float("inf")
    add_updates(x_TD, y_TO, stacked, ranges)
    first, end = ranges[1]
    assert y_TO[first:end].isnan().all()
    others = [row for row in range(48) if not first <= row < end and row != last]
    assert y_TO[others].isfinite().all()

"""The batched products of many slots give what each slot's own products give."""

from __future__ import annotations

import pytest
import torch

from lowrank.adapters.linear import Piece
from lowrank.kernels.grouped import batched_forward, prefers_batched

IN, OUT = 24, 40


def pieces_of(ranges: list[tuple[int, int]], scales: list[float], dtype: torch.dtype) -> list[Piece]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return [Piece(first, end, scale, random(4, IN), random(OUT, 4)) for (first, end), scale in zip(ranges, scales)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [[2.0] * 5, [2.0, 0.5, 1.0, 1.5, -1.0]])
@pytest.mark.parametrize(
    "ranges",
    [
        [(2, 4), (4, 6), (6, 8), (8, 10), (10, 12)],
        [(1, 2), (2, 5), (5, 6), (6, 8), (8, 11)],
        [(0, 3), (4, 6), (6, 7), (9, 12), (12, 13)],
    ],
)
def test_equals_the_loop(dtype: torch.dtype, scales: list[float], ranges: list[tuple[int, int]]) -> None:
    pieces = pieces_of(ranges, scales, dtype)
    x_TD, y_TO = torch.randn(14, IN).to(dtype), torch.randn(14, OUT).to(dtype)
    expected = y_TO.double()
    for piece in pieces:
        rows = slice(piece.first, piece.end)
        expected[rows] += piece.scale * (x_TD[rows].double() @ piece.A_RD.double().t() @ piece.B_OR.double().t())
    assert prefers_batched(x_TD, pieces)
    batched_forward(x_TD, y_TO, pieces)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
    torch.testing.assert_close(y_TO.double(), expected, atol=tolerance, rtol=tolerance / 10)


def test_a_slot_that_diverged_stays_by_itself() -> None:
    pieces = pieces_of([(0, 1), (1, 4), (4, 5), (5, 6), (6, 8)], [1.0] * 5, torch.float32)
    pieces[1].A_RD.fill_(float("nan"))
    x_TD, y_TO = torch.randn(8, IN), torch.zeros(8, OUT)
    x_TD[6] = float("inf")
    batched_forward(x_TD, y_TO, pieces)
    assert y_TO[1:4].isnan().all()
    assert y_TO[[0, 4, 5, 7]].isfinite().all()


def test_what_goes_through_the_loop() -> None:
    x_TD = torch.randn(200, IN)
    few = pieces_of([(0, 2), (2, 4), (4, 6), (6, 8)], [1.0] * 4, torch.float32)
    long = pieces_of([(index * 40, index * 40 + 40) for index in range(5)], [1.0] * 5, torch.float32)
    uneven = pieces_of([(0, 20), (20, 21), (21, 22), (22, 23), (23, 24)], [1.0] * 5, torch.float32)
    assert not any(prefers_batched(x_TD, pieces) for pieces in (few, long, uneven))

"""GPTQ against its definition: less error on what was seen, and exact where there is nothing to make up for."""

from __future__ import annotations

import pytest
import torch

from lowrank.quantization.codebook import by_codebook, nf4_levels
from lowrank.quantization.compensated import Even, Grid, Levels, quantize_matrix


def correlated(rows: int, columns: int) -> torch.Tensor:
    """Inputs as layers see them: few directions carry most."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    return torch.randn(rows, columns, generator=generator) @ mix


GRIDS: list[Grid] = [
    Even(2, symmetric=False),
    Even(3),
    Even(4),
    Even(4, symmetric=False),
    Even(8),
    Levels(nf4_levels()),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("group_size", [32, 192])
def test_error_on_seen_inputs_falls(grid: Grid, group_size: int) -> None:
    torch.manual_seed(0)
    weight_OD, x_TD = torch.randn(48, 192), correlated(512, 192)
    moment_DD = x_TD.t() @ x_TD / len(x_TD)
    _, nearest = quantize_matrix(weight_OD, grid, group_size)
    groups, compensated = quantize_matrix(weight_OD, grid, group_size, moment_DD)

    def error(value_OD: torch.Tensor) -> float:
        return float((x_TD @ (value_OD - weight_OD).t()).square().mean())

    assert error(compensated) < 0.6 * error(nearest)
    if isinstance(grid, Even):
        torch.testing.assert_close(groups.weight(), compensated)
        if not grid.symmetric:
            assert groups.zero_OG.min() >= 1


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    torch.manual_seed(0)
    weight_OD = torch.randn(16, 64)
    _, nearest = quantize_matrix(weight_OD, Even(4), 32)
    _, compensated = quantize_matrix(weight_OD, Even(4), 32, torch.eye(64))
    assert torch.equal(nearest, compensated)


def test_column_by_column_is_the_closed_form() -> None:
    """Two columns: the second becomes w2 + e1 h12 / h22, the least squares answer to the first one's error."""
    weight_OD = torch.tensor([[0.37, -0.81], [0.22, 0.64]])
    moment_DD = torch.tensor([[2.0, 1.2], [1.2, 1.5]])
    grid = Even(3)
    _, value_OD = quantize_matrix(weight_OD, grid, 2, moment_DD)
    scale_O1, zero_O1 = grid.fit(weight_OD)
    damped = moment_DD + 0.01 * moment_DD.diagonal().mean() * torch.eye(2)
    first_O = grid.value(grid.code(weight_OD[:, :1], scale_O1, zero_O1), scale_O1, zero_O1)[:, 0]
    moved_O = weight_OD[:, 1] + (weight_OD[:, 0] - first_O) * damped[0, 1] / damped[1, 1]
    second_O1 = grid.value(grid.code(moved_O[:, None], scale_O1, zero_O1), scale_O1, zero_O1)
    torch.testing.assert_close(value_OD, torch.cat([first_O[:, None], second_O1], 1))


def test_inputs_that_are_always_zero_and_zero_weights() -> None:
    torch.manual_seed(0)
    weight_OD, x_TD = torch.randn(8, 32), correlated(64, 32)
    x_TD[:, 5] = 0
    weight_OD[3] = 0
    _, value_OD = quantize_matrix(weight_OD, Even(4), 32, x_TD.t() @ x_TD)
    assert value_OD.isfinite().all()
    assert (value_OD[3] == 0).all()


def test_nearest_levels_are_those_of_the_reference() -> None:
    torch.manual_seed(0)
    weight_OD = torch.randn(24, 128)
    groups, value_OD = quantize_matrix(weight_OD, Levels(nf4_levels()), 64)
    reference = by_codebook(weight_OD, nf4_levels(), 64)
    assert torch.equal(groups.code_OD.flatten(), reference.code_N)
    torch.testing.assert_close(value_OD, reference.weight())

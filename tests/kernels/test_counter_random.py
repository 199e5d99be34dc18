"""Counter-based random numbers: as good as independent, and the same wherever they are drawn."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lowrank.kernels.counter_random import dropout, key_of, random_bits, uniform

ROWS, WIDTH = 512, 4096


def signs(key: int, rows: int = ROWS, width: int = WIDTH, rate: float = 0.5) -> torch.Tensor:
    """(rows, width) of mean 0 and variance 1: which elements dropout keeps, standardised."""
    kept = dropout(torch.ones(rows, width), torch.arange(rows), key, rate).ne(0).double()
    return (kept - (1 - rate)) / (rate * (1 - rate)) ** 0.5


def largest(correlations: torch.Tensor) -> float:
    return correlations.abs().max().item()


@pytest.mark.parametrize("key", [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, key_of(3, "model.layers.0.q_proj")])
def test_uniform_over_256_bins(key: int) -> None:
    """Chi-square of 2 million draws with 255 degrees of freedom: 255 +- 6 standard deviations (22.6)."""
    draws = uniform(torch.arange(ROWS), WIDTH, key)
    assert draws.dtype == torch.float32
    assert draws.min() >= -1.0
    assert draws.max() <= 1.0
    count = torch.histc(draws.double(), 256, -1, 1)
    expected = draws.numel() / 256
    assert abs(((count - expected) ** 2 / expected).sum().item() - 255) < 6 * 22.6


def test_every_bit_is_fair() -> None:
    bits = random_bits(torch.arange(ROWS), WIDTH, 12345)
    for place in range(32):
        share = ((bits >> place) & 1).double().mean().item()
        assert abs(share - 0.5) < 6 * 0.5 / (ROWS * WIDTH) ** 0.5


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_dropout_rate(rate: float) -> None:
    kept = dropout(torch.ones(ROWS, WIDTH), torch.arange(ROWS), 7, rate).ne(0).double().mean().item()
    assert abs(kept - (1 - rate)) < 6 * (rate * (1 - rate) / (ROWS * WIDTH)) ** 0.5


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("key", [0, key_of(0, 0, "a"), key_of(7, 6, "l")])
def test_rows_and_columns_are_independent(key: int, rate: float) -> None:
    """Correlation of all pairs of rows, and of columns: the largest of 131,000 normals stays below 6.

    Half a round of mixing less, and with the last key two tokens drew nearly the same mask (50).
    """
    for x in (signs(key, rate=rate), signs(key, rows=WIDTH, width=ROWS, rate=rate).t()):
        correlation = x @ x.t() / WIDTH**0.5
        others = correlation[~torch.eye(ROWS, dtype=torch.bool)]
        assert largest(others) < 6
        assert others.std().item() == pytest.approx(1.0, abs=0.02)  # neither too even nor too wild


def test_places_are_independent() -> None:
    """Two steps, layers or seeds: no row of one correlates with any row of the other."""
    keys = [key_of(seed, step, layer) for seed in (0, 1) for step in (0, 1, 2) for layer in ("l.0.q", "l.0.k", "l.1.q")]
    keys += [5, 6, 7, 5 ^ (1 << 31)]  # neighbors, as the plain counter would give
    assert len(set(keys)) == len(keys)
    masks = [signs(key, rows=64, width=1024) for key in keys]
    for index, one in enumerate(masks):
        for other in masks[:index]:
            assert largest(one @ other.t() / 32) < 6.5  # 4096 pairs x 231
            assert abs((one * other).mean().item()) * 256 < 6


def test_four_neighbors_together_are_independent() -> None:
    """Sums of hashes can make x(i,j) x(i,k) x(l,j) x(l,k) one sign; a sum with a real mix on top does not."""
    x = signs(99)
    for row_step in (1, 2, 64):
        for column_step in (1, 8, 256):
            product = x[row_step:, column_step:] * x[:-row_step, column_step:]
            product = product * x[row_step:, :-column_step] * x[:-row_step, :-column_step]
            assert abs(product.mean().item()) * product.numel() ** 0.5 < 6


def test_counters_far_apart_differ() -> None:
    far = torch.tensor([0, 1, 1 << 20, (1 << 31) - 1])
    draws = random_bits(far, 256, 5)
    assert all(not torch.equal(draws[i], draws[j]) for i in range(4) for j in range(i))


def test_a_row_depends_on_its_counter_alone() -> None:
    """Cutting, padding and reordering do not change what a token draws."""
    whole = random_bits(torch.arange(100), 48, 5)
    assert torch.equal(random_bits(torch.arange(40, 60), 48, 5), whole[40:60])
    assert torch.equal(random_bits(torch.arange(99, -1, -1), 48, 5), whole.flip(0))
    assert torch.equal(random_bits(torch.arange(100), 32, 5), whole[:, :32])


def test_same_numbers_in_another_process() -> None:
    code = (
        "import torch; from lowrank.kernels.counter_random import key_of, random_bits;"
        "torch.manual_seed(123); print(random_bits(torch.arange(3), 4, key_of(1, 2, 'x.y')).tolist())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = random_bits(torch.arange(3), 4, key_of(1, 2, "x.y")).tolist()
    assert output.strip() == str(here)
    # written down, so that a resumed run of another version draws the same
    assert key_of(1, 2, "x.y") == 1041132457
    assert here[0] == [-548379964, -55328162, -966654417, -1338396782]


def test_dropout_is_linear_and_scaled() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = torch.arange(50)

    def drop(z: torch.Tensor) -> torch.Tensor:
        return dropout(z, rows, 3, 0.25)

    torch.testing.assert_close(drop(2 * x + y), 2 * drop(x) + drop(y), rtol=0, atol=1e-14)
    kept = drop(x) != 0
    torch.testing.assert_close(drop(x)[kept], x[kept] / 0.75, rtol=1e-15, atol=0)
    # its own transpose: <drop(x), y> = <x, drop(y)>, which the backward pass of the routed linear relies on
    assert (drop(x) * y).sum().item() == pytest.approx((x * drop(y)).sum().item(), rel=1e-12)
    assert dropout(x, rows, 3, 0.0) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mask_does_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    ones = torch.ones(20, 64)
    assert torch.equal(
        dropout(ones.to(dtype), torch.arange(20), 3, 0.25) != 0, dropout(ones, torch.arange(20), 3, 0.25) != 0
    )
    assert dropout(ones.to(dtype), torch.arange(20), 3, 0.25).dtype == dtype


def test_keys_of_a_long_run_seldom_meet() -> None:
    """500 steps of 168 layers: a random 32-bit key would meet itself about 0.8 times in 84,000."""
    keys = {key_of(42, step, f"model.layers.{i}.{n}") for step in range(500) for i in range(24) for n in "qkvogud"}
    assert len(keys) > 500 * 168 - 8

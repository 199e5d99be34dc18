"""The reference quantizers against what theory and the peers say of normal and heavy-tailed weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lowrank.quantization.codebook import by_codebook, dynamic_levels, fp4_levels, nf4_levels
from lowrank.quantization.groups import Groups
from lowrank.quantization.half_quadratic import half_quadratic
from lowrank.quantization.linear import asymmetric, symmetric


def relative_error(quantized: torch.Tensor, weight: torch.Tensor) -> float:
    return float((quantized - weight).norm() / weight.norm())


@pytest.fixture(scope="module")
def normal() -> torch.Tensor:
    return torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def student() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(5.0).sample((512, 1024))


@pytest.mark.parametrize(
    ("quantize", "expected"),
    [
        (lambda w: by_codebook(w, nf4_levels(), 32), 0.0873),
        (lambda w: by_codebook(w, nf4_levels(), 64), 0.0920),
        (lambda w: by_codebook(w, nf4_levels(), 64, double_quantized=True), 0.0920),
        (lambda w: by_codebook(w, nf4_levels(), 128), 0.0956),
        (lambda w: by_codebook(w, nf4_levels(), 256), 0.0987),
        (lambda w: by_codebook(w, fp4_levels(), 64), 0.1219),
        (lambda w: symmetric(w, 4, 64), 0.1077),
        (lambda w: symmetric(w, 4, 64, full_range=True), 0.0950),
        (lambda w: asymmetric(w, 4, 64), 0.0911),
        (lambda w: asymmetric(w, 4, 32), 0.0808),
        (lambda w: asymmetric(w, 4, 128), 0.1006),
        (lambda w: symmetric(w, 8, 64), 0.0059),
        (lambda w: symmetric(w, 8), 0.0079),
        (lambda w: asymmetric(w, 6, 64), 0.0217),
        (lambda w: asymmetric(w, 5, 64), 0.0441),
        (lambda w: asymmetric(w, 3, 64), 0.195),
        (lambda w: asymmetric(w, 2, 64), 0.457),
        (lambda w: symmetric(w, 2, 64, full_range=True), 0.394),
    ],
)
def test_relative_error_on_normal_weights(
    quantize: Callable[[torch.Tensor], Groups], expected: float, normal: torch.Tensor
) -> None:
    assert relative_error(quantize(normal).weight(), normal) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("quantize", "expected"),
    [
        (lambda w: by_codebook(w, nf4_levels(), 64), 0.1047),
        (lambda w: by_codebook(w, fp4_levels(), 64), 0.1542),
        (lambda w: asymmetric(w, 4, 64), 0.1120),
    ],
)
def test_relative_error_on_heavy_tails(
    quantize: Callable[[torch.Tensor], Groups], expected: float, student: torch.Tensor
) -> None:
    assert relative_error(quantize(student).weight(), student) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("bits", "published", "fitted"),
    [(8, 0.00503, 0.00503), (6, 0.0205, 0.0205), (5, 0.0417, 0.0415), (4, 0.0861, 0.0839), (3, 0.183, 0.169),
     (2, 0.4346, 0.330), (1, 1.51, 0.69)],
)  # fmt: skip
def test_half_quadratic(bits: int, published: float, fitted: float, normal: torch.Tensor) -> None:
    """`published` is what the package hqq 0.2.8 gives in float32, to 2.5 %; see test_peers."""
    plain = relative_error(half_quadratic(normal, bits, fit_scale=False).weight(), normal)
    better = relative_error(half_quadratic(normal, bits).weight(), normal)
    assert plain == pytest.approx(published, rel=0.02)
    assert better == pytest.approx(fitted, rel=0.02)
    assert better <= plain * 1.001


def test_half_quadratic_beats_rounding_at_every_width(normal: torch.Tensor, student: torch.Tensor) -> None:
    for weight in (normal, student):
        for bits in range(2, 9):
            rounded = relative_error(asymmetric(weight, bits, 64).weight(), weight)
            assert relative_error(half_quadratic(weight, bits).weight(), weight) < rounded, bits


@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("bits", [8, 4])
def test_half_quadratic_does_not_mind_the_size_of_the_weights(bits: int, scale: float) -> None:
    """Its scales are 16 bits where those hold them, and 32 where not."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * scale
    assert relative_error(half_quadratic(weight, bits).weight(), weight) < {8: 0.0053, 4: 0.0890}[bits]


def test_groups_of_one_value_are_exact() -> None:
    weight = torch.tensor([[0.0] * 64 + [0.25] * 64 + [-3.0] * 64])
    for quantized in (asymmetric(weight, 4, 64), symmetric(weight, 4, 64), half_quadratic(weight, 4)):
        assert torch.equal(quantized.weight(), weight)
    assert torch.equal(by_codebook(weight, nf4_levels()).weight(), weight)


@pytest.mark.parametrize("columns", [1, 63, 65, 100])
def test_the_last_group_has_what_is_left(columns: int) -> None:
    weight = torch.randn(7, columns)
    for quantized in (asymmetric(weight, 8, 64), symmetric(weight, 8, 64), half_quadratic(weight, 8)):
        assert quantized.code_OD.shape == weight.shape
        assert quantized.scale_OG.shape == (7, -(-columns // 64))
        assert relative_error(quantized.weight(), weight) < 0.01


@pytest.mark.parametrize(("code", "levels"), [("nf4", nf4_levels()), ("fp4", fp4_levels())])
@pytest.mark.parametrize("double", [False, True])
def test_four_bits_are_bitsandbytes(code: str, levels: torch.Tensor, double: bool, normal: torch.Tensor) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(normal, quant_type=code, compress_statistics=double)
    theirs = functional.dequantize_4bit(packed, state)
    ours = by_codebook(normal, levels, 64, double_quantized=double).weight()
    same = torch.isclose(ours, theirs, rtol=1e-5, atol=1e-6)
    # a scale right between two of its own 256 levels may fall to either side
    assert same.float().mean() > (0.995 if double else 0.99999)
    torch.testing.assert_close(ours, theirs, rtol=0.015, atol=1e-6)


def test_the_dynamic_map_is_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.testing.assert_close(dynamic_levels(), functional.create_dynamic_map(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1])
def test_peer_hqq(bits: int, normal: torch.Tensor) -> None:
    """The published method costs no more than 2.5 % of the package's error; the fitted one less than the package's."""
    peer = pytest.importorskip("hqq.core.quantize").Quantizer
    packed, meta = peer.quantize(normal, nbits=bits, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32)
    theirs = relative_error(peer.dequantize(packed, {**meta, "compute_dtype": torch.float32}), normal)
    assert relative_error(half_quadratic(normal, bits, fit_scale=False).weight(), normal) < theirs * 1.025
    assert relative_error(half_quadratic(normal, bits).weight(), normal) < theirs * 1.001

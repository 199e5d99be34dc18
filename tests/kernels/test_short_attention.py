"""Attention with the written-out backward pass against torch's reference."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lowrank.kernels.short_attention as kernel

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SHAPES = {
    "one head": (2, 1, 1, 9, 8),
    "many heads": (3, 4, 4, 17, 8),
    "grouped": (3, 6, 2, 17, 8),
    "one key head": (2, 4, 1, 33, 16),
    "one token": (2, 4, 2, 1, 8),
    "several blocks": (2, 4, 2, 300, 8),
}


def operands(shape: str, dtype: torch.dtype) -> tuple[Triple, torch.Tensor]:
    num, heads, key_heads, length, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def random(count: int) -> torch.Tensor:
        return torch.randn(num, count, length, width, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = (random(count).requires_grad_() for count in (heads, key_heads, key_heads))
    return (q, k, v), random(heads)


def short_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The kernel on N documents of one length, (N, H, L, d), laid out as its stream."""
    num, _, length, _ = q.shape
    stream = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k, v))
    output_THd = kernel.short_attention(*stream, (length,) * num, scale)
    return output_THd.view(num, length, *output_THd.shape[1:]).transpose(1, 2)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("block_elements", [8 << 20, 1], ids=["all at once", "one by one"])
@pytest.mark.parametrize("shape", SHAPES)
def test_double_precision(shape: str, block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_BLOCK_ELEMENTS", block_elements)
    inputs, outer = operands(shape, torch.float64)
    ours, theirs = short_attention(*inputs, 0.3), reference(*inputs, 0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(ours, inputs, outer), torch.autograd.grad(theirs, inputs, outer)):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_is_no_worse_than_torch(shape: str, dtype: torch.dtype) -> None:
    """Relative error of each gradient against double precision: within 1.5 times that of torch's own, or 1 %."""
    inputs, outer = operands(shape, dtype)
    wide = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    exact = torch.autograd.grad(reference(*wide, 0.3), wide, outer.double())
    ours = torch.autograd.grad(short_attention(*inputs, 0.3), inputs, outer)
    theirs = torch.autograd.grad(reference(*inputs, 0.3), inputs, outer)
    for one, other, true in zip(ours, theirs, exact):
        assert one.dtype == dtype
        bound = max(1.5 * (other.double() - true).norm().item(), 1e-2 * true.norm().item(), 1e-9)
        assert (one.double() - true).norm().item() <= bound


def test_a_head_that_looks_at_one_token_gets_no_noise() -> None:
    """Where the softmax is saturated, the gradient of q and k is tiny; what is left is the rounding of the sums."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 2, 64, 64).unbind(0)
    q, outer = torch.randn(2, 2, 8, 64, 64).unbind(0)
    flat = [tensor.bfloat16().requires_grad_() for tensor in (q, k, v)]
    usual = torch.autograd.grad(reference(*flat, 0.125), flat, outer.bfloat16())
    k[:, :, 0] += 1.6
    sharp = [tensor.bfloat16().requires_grad_() for tensor in (q + 1.6, k, v)]
    wide = [tensor.detach().double().requires_grad_() for tensor in sharp]
    exact = torch.autograd.grad(reference(*wide, 0.125), wide, outer.bfloat16().double())
    ours = torch.autograd.grad(short_attention(*sharp, 0.125), sharp, outer.bfloat16())
    for one, true, size in zip(ours[:2], exact, usual):
        assert (one.double() - true).norm() < 2e-3 * size.double().norm()


def test_documents_of_different_lengths() -> None:
    """A stream of documents is each document alone, in its place."""
    lengths = (40, 3, 200, 33, 129, 40)
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    outer = torch.randn_like(q)
    ours = kernel.short_attention(q, k, v, lengths, 0.3)
    alone = [
        reference(*(tensor.transpose(0, 1)[None] for tensor in document), 0.3)[0].transpose(0, 1)
        for document in zip(*(tensor.split(lengths) for tensor in (q, k, v)))
    ]
    torch.testing.assert_close(ours, torch.cat(alone), rtol=1e-12, atol=1e-12)
    theirs = torch.autograd.grad(torch.cat(alone), (q, k, v), outer)
    for one, other in zip(torch.autograd.grad(ours, (q, k, v), outer), theirs):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("height", [30.0, 100.0])
@pytest.mark.parametrize("scale", [0.125, 128**-0.5])
def test_high_scores_are_as_good_as_low_ones(height: float, scale: float) -> None:
    """A part that all keys share lifts every score and changes no probability; bf16 cannot hold such scores."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 2, 64, 64).unbind(0)
    q, outer = torch.randn(2, 2, 8, 64, 64).unbind(0)
    q[..., 0], k[..., 0] = height, 8.0
    inputs = [tensor.bfloat16().requires_grad_() for tensor in (q, k, v)]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = torch.autograd.grad(reference(*wide, scale), wide, outer.bfloat16().double())
    ours = torch.autograd.grad(short_attention(*inputs, scale), inputs, outer.bfloat16())
    for one, true in zip(ours, exact):
        assert (one.double() - true).norm() < 1e-2 * true.norm()


def test_padding_behind_a_document_is_invisible() -> None:
    """Rows of zeros after the end, as attention by length adds them: the same output, and no gradient from there."""
    (q, k, v), outer = operands("grouped", torch.float64)
    padded = tuple(F.pad(tensor.detach(), (0, 0, 0, 15)).requires_grad_() for tensor in (q, k, v))
    alone = short_attention(q, k, v, 0.3)
    together = short_attention(*padded, 0.3)[:, :, :17]
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-14)
    ours = torch.autograd.grad(together, padded, outer)
    for one, other in zip(ours, torch.autograd.grad(alone, (q, k, v), outer)):
        torch.testing.assert_close(one[:, :, :17], other, rtol=0, atol=1e-13)
        assert one[:, :, 17:].abs().max() == 0


def test_a_nan_document_stays_alone() -> None:
    (q, k, v), outer = operands("grouped", torch.float64)
    clean = torch.autograd.grad(short_attention(q, k, v, 0.3), (q, k, v), outer)
    with torch.no_grad():
        q[1] = float("nan")
    for one, other in zip(torch.autograd.grad(short_attention(q, k, v, 0.3), (q, k, v), outer), clean):
        assert one[1].isnan().any()
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[2], other[2])

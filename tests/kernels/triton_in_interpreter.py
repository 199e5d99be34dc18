"""Run by test_triton.py with TRITON_INTERPRET=1: every Triton kernel beside its plain function, on a processor.

Prints the kernels that were launched. The sizes are those at which kernels go wrong: odd, one row, none, not
contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from triton.runtime.interpreter import InterpretedFunction

from lowrank.kernels import four_bit, fused, gated_triton, logprobs_triton, rms_norm_triton
from lowrank.kernels.decode_lora import add_updates_by_row
from lowrank.kernels.decode_lora_triton import add_updates_triton
from lowrank.kernels.four_bit_triton import dequantize_triton, product_triton
from lowrank.kernels.gated import gated
from lowrank.kernels.logprobs import Head, _score_chunk, logprobs
from lowrank.kernels.rms_norm import rms_norm
from lowrank.models.storages.four_bit import four_bit_of

LAUNCHED: set[str] = set()


def watch_launches() -> None:
    """Note each kernel that is launched."""
    run = InterpretedFunction.run

    def noted(self: Any, *given: Any, **named: Any) -> Any:
        LAUNCHED.add(f"{self.fn.__module__.removeprefix('lowrank.kernels.')}.{self.fn.__name__}")
        return run(self, *given, **named)

    InterpretedFunction.run = noted  # type: ignore[method-assign]


def check_dequantize() -> None:
    """Bit for bit. bfloat16 to its rounding: the interpreter rounds it in its own way."""
    for code, shape, block_size, dtype in (
        ("nf4", (64, 64), 64, torch.float32), ("nf4", (5, 33), 64, torch.float32), ("fp4", (70, 96), 32, torch.float32),
        ("fp4", (3, 7), 64, torch.float16), ("nf4", (40, 130), 128, torch.float16), ("nf4", (1, 1), 64, torch.float32),
        ("nf4", (1, 4096), 4096, torch.float16), ("nf4", (0, 64), 64, torch.float32),
        ("nf4", (3, 7), 64, torch.bfloat16),
    ):  # fmt: skip
        torch.manual_seed(0)
        weight = torch.randn(shape)
        packed, absmax = four_bit.quantize(weight, code, block_size) if weight.numel() else empty_codes()
        every_other = torch.stack([packed, packed], dim=1)[:, 0]  # the same codes, not contiguous
        values = torch.tensor(four_bit.CODES[code])
        expected = torch.full((weight.numel(),), 7.0, dtype=dtype)
        four_bit.dequantize_torch(packed, absmax, code, block_size, expected)
        for codes in (packed, every_other):
            guarded = torch.full((weight.numel() + 8,), 7.0, dtype=dtype)
            dequantize_triton(codes, absmax, values, block_size, guarded[: weight.numel()])
            case = (code, shape, block_size, dtype)
            assert (guarded[weight.numel() :] == 7).all(), ("wrote beyond its end", case)
            tolerance = {"rtol": 2**-7, "atol": 0} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(guarded[: weight.numel()], expected, msg=str(case), **tolerance)


def empty_codes() -> tuple[torch.Tensor, torch.Tensor]:
    """What no weights are."""
    return torch.empty(0, dtype=torch.uint8), torch.empty(0)


def check_product() -> None:
    """Against the plain product with the unpacked weight."""
    for code, rows, height, width, block_size in (
        ("nf4", 1, 70, 96, 64), ("nf4", 16, 64, 128, 32), ("fp4", 3, 33, 62, 64), ("nf4", 0, 8, 32, 32),
    ):  # fmt: skip
        torch.manual_seed(0)
        weight = torch.randn(height, width)
        packed, absmax = four_bit.quantize(weight, code, block_size)
        dense = torch.empty(height * width, dtype=torch.float16)
        four_bit.dequantize_torch(packed, absmax, code, block_size, dense)
        x = torch.randn(2 * rows, width).half()[::2]  # not contiguous
        out = torch.full((rows + 1, height), 7.0, dtype=torch.float16)
        product_triton(x, packed, absmax, torch.tensor(four_bit.CODES[code]), block_size, out[:rows])
        assert (out[rows:] == 7).all()
        expected = (x.float() @ dense.view(height, width).float().t()).half()
        torch.testing.assert_close(out[:rows], expected, rtol=2e-3, atol=2e-3)


def check_rms_norm() -> None:
    """Forward, and the gradient of x, of all three kinds."""
    for kind in ("llama", "olmo2", "gemma"):
        for rows, width, dtype in (
            (5, 33, torch.float32),
            (1, 64, torch.float16),
            (0, 16, torch.float32),
            (3, 1, torch.float32),
        ):
            torch.manual_seed(0)
            x = (torch.randn(2 * rows, width) + 0.5).to(dtype)[::2].requires_grad_()
            weight, dy = torch.randn(width).to(dtype), torch.randn(rows, width).to(dtype)
            y = rms_norm(x, weight, 1e-5, kind)  # type: ignore[arg-type]
            (dx,) = torch.autograd.grad(y, x, dy) if rows else (torch.zeros_like(x),)
            ours, inverse, ours_dx = (
                torch.empty(rows, width, dtype=dtype),
                torch.empty(rows, 1),
                torch.empty(rows, width, dtype=dtype),
            )
            rms_norm_triton.forward_triton(x.detach(), weight, 1e-5, kind, ours, inverse)
            rms_norm_triton.backward_triton(x.detach(), weight, dy, inverse, kind, ours_dx)
            tolerance = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(ours, y.detach(), **tolerance)
            torch.testing.assert_close(ours_dx, dx, **tolerance)


def check_gated() -> None:
    """Forward and both gradients of every activation; large gates too."""
    acts = {"silu": functional.silu, "gelu": functional.gelu, "gelu_tanh": partial(functional.gelu, approximate="tanh")}
    assert acts.keys() == gated_triton.KINDS.keys()
    for kind, act in acts.items():
        for shape, dtype in (
            ((5, 33), torch.float32),
            ((1, 1), torch.float32),
            ((0, 4), torch.float32),
            ((40, 70), torch.float16),
        ):
            torch.manual_seed(0)
            gate, up = ((6 * torch.randn(shape[1], shape[0])).to(dtype).t().requires_grad_() for _ in range(2))
            dy = torch.randn(shape).to(dtype)
            y = gated(gate, up, act)
            gradients = torch.autograd.grad(y, (gate, up), dy)
            ours = [torch.empty(shape, dtype=dtype) for _ in range(3)]
            gated_triton.forward_triton(gate.detach(), up.detach(), kind, ours[0])
            gated_triton.backward_triton(gate.detach(), up.detach(), dy, kind, ours[1], ours[2])
            tolerance = {"rtol": 4e-3, "atol": 4e-3} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-4}
            for one, other in zip(ours, (y.detach(), *gradients)):
                torch.testing.assert_close(one, other, **tolerance)


def check_logprobs() -> None:
    """log p and what stands in the place of the logits; with a multiplier, a soft cap, and logits far from 0."""
    for rows, vocabulary, multiplier, softcap, dtype in (
        (3, 33, 1.0, None, torch.float32), (1, 5000, 0.5, None, torch.float32), (4, 100, 2.0, 3.0, torch.float32),
        (0, 10, 1.0, None, torch.float32), (5, 300, 1.0, 30.0, torch.float16), (2, 1, 1.0, None, torch.float32),
    ):  # fmt: skip
        torch.manual_seed(0)
        raw = (8 * torch.randn(rows, vocabulary) - 40).to(dtype)
        target = torch.randint(vocabulary, (2 * rows,))[::2]
        head = Head(torch.empty(vocabulary, 1), multiplier=multiplier, softcap=softcap)
        expected = raw.clone()
        with_gradient = _score_chunk(expected, target, head, True)
        for gradient in (True, False):
            ours, logprob = raw.clone(), torch.empty(rows)
            logprobs_triton.score_triton(ours, target, logprob, multiplier, softcap, gradient)
            tolerance = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(logprob, with_gradient, **tolerance)
            torch.testing.assert_close(ours, expected if gradient else raw, **tolerance)


def check_decode_lora() -> None:
    """Against the plain product of every row with the A and B of its group; a group that diverged stays by itself."""
    for rows, width, height, ranks, dtype in (
        (5, 33, 70, (3, 1, 3), torch.float32), (1, 5000, 16, (16,), torch.float32), (0, 8, 8, (4,), torch.float32),
        (9, 64, 300, (64, 64), torch.float16), (3, 8, 8, (), torch.float32), (7, 1, 1, (1, 1), torch.float32),
    ):  # fmt: skip
        torch.manual_seed(0)
        group_T = torch.arange(2 * rows)[::2] % (len(ranks) + 1) - 1  # not contiguous, as x
        x_TD = torch.randn(2 * rows, width).to(dtype)[::2]
        rank = max(ranks, default=1)
        A_GRD, B_GOR = (torch.zeros(len(ranks), *shape).to(dtype) for shape in ((rank, width), (height, rank)))
        for group, own in enumerate(ranks):
            A_GRD[group, :own], B_GOR[group, :, :own] = torch.randn(own, width), torch.randn(height, own)
        scale_G, y_TO = torch.linspace(0.5, 2, len(ranks)), torch.randn(rows + 1, height).to(dtype)
        expected_TO = y_TO.float()
        for row, group in enumerate(group_T.tolist()):
            if group >= 0:
                h_R = A_GRD[group].float() @ x_TD[row].float()
                expected_TO[row] += scale_G[group] * (B_GOR[group].float() @ h_R)
        add_updates_triton(x_TD, y_TO[:rows], A_GRD, B_GOR, scale_G, group_T.contiguous())
        tolerance = {"rtol": 2e-3, "atol": 2e-2} if dtype == torch.float16 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(y_TO.float(), expected_TO, **tolerance)
    diverged, y_TO = torch.randn(2, 4, 40), torch.zeros(3, 24)
    diverged[0] = float("nan")
    group_T = torch.tensor([0, 1, -1])
    add_updates_triton(torch.randn(3, 40), y_TO, diverged, torch.randn(2, 24, 4), torch.ones(2), group_T)
    assert y_TO[0].isnan().all()
    assert y_TO[1].isfinite().all()
    assert not y_TO[2].any()


def check_seams() -> None:
    """What the rest of lowrank calls takes the Triton bodies, after their own check, and agrees with plain torch."""
    fused.is_nvidia = lambda device: True  # type: ignore[assignment]
    torch.manual_seed(0)
    x, dy = torch.randn(6, 64).half(), torch.randn(6, 64).half()
    weight, up = torch.randn(64).half(), torch.randn(6, 64).half()
    head, target = Head(torch.randn(50, 64).half(), softcap=20.0), torch.arange(6)
    linear = torch.nn.Linear(64, 40).half().requires_grad_(False)
    packed = four_bit_of(linear, "nf4", 32, double_quant=True)

    def gradient(function: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        return y.detach(), torch.autograd.grad(y, leaf, dy if y.shape == dy.shape else torch.ones_like(y))[0]

    def answered(leaf: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            straight = packed(leaf)
        return straight + 0 * leaf.sum()

    def with_adapter(leaf: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(6, 64).half()
        add_updates_by_row(y, leaf.detach(), *adapters)
        return y + 0 * leaf

    torch.manual_seed(1)
    A_GRD, B_GOR = torch.randn(2, 8, 64).half(), torch.randn(2, 64, 8).half()
    adapters = A_GRD, B_GOR, torch.full((2,), 0.02), torch.tensor([0, 0, 1, 1, 1, -1])
    for name, function in {
        "rms_norm_triton._forward rms_norm_triton._backward": lambda leaf: rms_norm(leaf, weight, 1e-6),
        "gated_triton._forward gated_triton._backward": lambda leaf: gated(leaf, up, torch.nn.SiLU()),
        "logprobs_triton._score": lambda leaf: logprobs(leaf, target, head),
        "four_bit_triton._product": answered,
        "decode_lora_triton._shrink decode_lora_triton._expand": with_adapter,
    }.items():
        before = LAUNCHED.copy()
        LAUNCHED.clear()
        ours = gradient(function)
        assert set(name.split()) <= LAUNCHED, name
        LAUNCHED.update(before)
        with fused.plain_only():
            plain = gradient(function)
        for one, other in zip(ours, plain):
            torch.testing.assert_close(one, other, rtol=5e-3, atol=5e-3)


if __name__ == "__main__":
    watch_launches()
    check_dequantize()
    check_product()
    check_rms_norm()
    check_gated()
    check_logprobs()
    check_decode_lora()
    check_seams()
    print(*sorted(LAUNCHED), sep="\n")

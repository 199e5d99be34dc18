"""A Triton body runs only where it has proved itself; where it does not, plain torch computes and a person is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowrank.kernels import four_bit, fused
from lowrank.kernels.gated import _kind_of

CPU = torch.device("cpu")
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def right(device: torch.device, dtype: torch.dtype) -> Pairs:
    return [(torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype))]


def wrong(device: torch.device, dtype: torch.dtype) -> Pairs:
    return [*right(device, dtype), (torch.ones(3, dtype=dtype), 1.1 * torch.ones(3, dtype=dtype))]


def not_finite(device: torch.device, dtype: torch.dtype) -> Pairs:
    return [(torch.full((3,), float("nan"), dtype=dtype), torch.ones(3, dtype=dtype))]


def breaks(device: torch.device, dtype: torch.dtype) -> Pairs:
    raise RuntimeError("PTX was compiled for another card")


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """On a GPU, as far as the choice knows; what a person is told."""
    received: list[str] = []
    monkeypatch.setattr(fused, "is_nvidia", lambda device: True)
    monkeypatch.setattr(fused, "has_triton", lambda: True)
    monkeypatch.setattr(fused, "log_notice", received.append)
    monkeypatch.setattr(fused, "_found", {})
    return received


@pytest.mark.parametrize(
    ("check", "runs", "phrase"),
    [
        (right, True, None),
        (wrong, False, "off by 9.2%"),
        (not_finite, False, "off by nan%"),
        (breaks, False, "another card"),
    ],
)
def test_only_what_is_right_runs(
    check: Callable[..., Pairs], runs: bool, phrase: str | None, notices: list[str]
) -> None:
    half = torch.ones(2, dtype=torch.bfloat16)
    for _ in range(2):
        assert fused.runs_fused(half, check) is runs
    assert len(notices) == (phrase is not None), "said once"
    assert phrase is None or phrase in notices[0]


def test_where_it_is_not_asked(notices: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.ones(2, dtype=torch.float16)
    assert not fused.runs_fused(half.float(), right)
    with fused.plain_only():
        assert not fused.runs_fused(half, right)
    assert fused.runs_fused(half, right)
    monkeypatch.setattr(fused, "is_nvidia", lambda device: False)
    assert not fused.runs_fused(half, right)


def test_activations_by_what_transformers_calls_them() -> None:
    from transformers.activations import ACT2FN

    assert {
        name: _kind_of(ACT2FN[name]) for name in ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu", "gelu_new")
    } == {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": None,
        "gelu_new": None,
    }


def test_a_check_does_not_see_who_asks(notices: list[str]) -> None:
    """The first call may come from inside a checkpointed layer or an inference mode."""
    seen: list[int] = []

    def compares(device: torch.device, dtype: torch.dtype) -> Pairs:
        leaf = torch.ones(3, dtype=dtype, requires_grad=True)
        (gradient,) = torch.autograd.grad((leaf * leaf).sum(), leaf)
        return [(gradient, torch.full((3,), 2.0, dtype=dtype))]

    half = torch.ones(2, dtype=torch.bfloat16)
    with torch.inference_mode(), torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(1) or x, lambda x: x):
        assert fused.runs_fused(half, compares)
    assert not seen
    assert not notices


def test_no_check_within_a_backward_pass(notices: list[str]) -> None:
    """It would wait for the thread that waits for it; what is not known by then is computed plainly."""
    enabled: list[bool] = []

    class Query(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *outer: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            enabled.append(fused.runs_fused(outer[0].bfloat16(), right))
            return outer[0]

    leaf = torch.ones(2, requires_grad=True)
    Query.apply(leaf).sum().backward()  # type: ignore[union-attr]
    assert fused.runs_fused(leaf.detach().bfloat16(), right)
    Query.apply(leaf).sum().backward()  # type: ignore[union-attr]
    assert enabled == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_four_bits_without_a_compiler(dtype: torch.dtype, notices: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A container without a C compiler: Triton cannot start, and the weights are unpacked by plain torch."""
    triton = pytest.importorskip("triton")

    def fails(*given: Any, **named: Any) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(triton.runtime.JITFunction, "run", fails)
    weight_OD = torch.randn(64, 96, dtype=dtype)
    packed, absmax = four_bit.quantize(weight_OD, "nf4", 64)
    given, expected = torch.empty(2, 64, 96, dtype=dtype).unbind()
    for _ in range(2):
        four_bit.dequantize(packed, absmax, "nf4", 64, given)
    four_bit.dequantize_torch(packed, absmax, "nf4", 64, expected.view(-1))
    assert torch.equal(given, expected)
    (notice,) = notices
    assert "kernel of four_bit does not run" in notice
    assert "C compiler" in notice

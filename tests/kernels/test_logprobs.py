"""Chunked log-probabilities against full logits and autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import lowrank.kernels.logprobs as kernel
from lowrank.kernels.logprobs import Head, logprobs

K, D, V, R = 23, 12, 37, 3

HEADS: dict[str, dict[str, object]] = {
    "plain": {},
    "bias": {"bias": True},
    "multiplier": {"multiplier": 0.25},
    "softcap": {"softcap": 3.0},
    "low_rank": {"low_rank": True},
    "everything": {"bias": True, "multiplier": 1.7, "softcap": 2.0, "low_rank": True},
}


@pytest.fixture(params=["one chunk", "many chunks"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Also with chunks of 5 rows that are walked over in blocks of 2."""
    if request.param == "many chunks":
        monkeypatch.setattr(kernel, "_CHUNK_LOGITS", 5 * V)
        monkeypatch.setattr(kernel, "_BLOCK_BYTES", 2 * V * 8)
    return request.param


def make_head(kind: str, dtype: torch.dtype = torch.float64, trains: bool = False) -> Head:
    """A random head of one of the `HEADS`; an adapter on it is always trained."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, grad: bool) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    parts = dict(HEADS[kind])
    head = Head(random(V, D, grad=trains))
    if parts.pop("bias", False):
        head = replace(head, bias_V=random(V, grad=trains))
    if parts.pop("low_rank", False):
        head = replace(head, low_rank=(random(R, D, grad=True), random(V, R, grad=True), 0.6))
    return replace(head, **parts)  # type: ignore[arg-type]


def written_out(hidden_KD: torch.Tensor, target_K: torch.Tensor, head: Head) -> torch.Tensor:
    """The definition: whole logits, log_softmax, autograd."""
    logits_KV = hidden_KD @ head.weight_VD.t()
    if head.bias_V is not None:
        logits_KV = logits_KV + head.bias_V
    if head.low_rank:
        A_RD, B_VR, scale = head.low_rank
        logits_KV = logits_KV + scale * hidden_KD @ A_RD.t() @ B_VR.t()
    logits_KV = logits_KV * head.multiplier
    if head.softcap:
        logits_KV = head.softcap * torch.tanh(logits_KV / head.softcap)
    return logits_KV.log_softmax(-1).gather(1, target_K[:, None])[:, 0]


def gradients(
    compute: Callable[[torch.Tensor, torch.Tensor, Head], torch.Tensor], head: Head, hidden_grad: bool = True
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Values, and the gradients of hidden states and everything the head trains, under a random outer gradient."""
    generator = torch.Generator().manual_seed(2)
    hidden_KD = torch.randn(K, D, generator=generator, dtype=torch.float64).to(head.weight_VD.dtype)
    hidden_KD.requires_grad_(hidden_grad)
    target_K = torch.randint(0, V, (K,), generator=generator)
    outer_K = torch.randn(K, generator=generator, dtype=torch.float64)
    wanted = [t for t in (hidden_KD, *head.trainable) if t is not None and t.requires_grad]
    value_K = compute(hidden_KD, target_K, head)
    return value_K.detach(), list(torch.autograd.grad(value_K, wanted, outer_K.to(value_K.dtype)))


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_value_and_gradients_in_double_precision(kind: str, trains: bool, chunked: str) -> None:
    value_K, ours = gradients(logprobs, make_head(kind, trains=trains))
    expected_K, theirs = gradients(written_out, make_head(kind, trains=trains))
    with_bias, with_adapter = kind in ("bias", "everything"), kind in ("low_rank", "everything")
    assert len(ours) == 1 + trains * (1 + with_bias) + 2 * with_adapter
    torch.testing.assert_close(value_K, expected_K, rtol=1e-12, atol=1e-12)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_only_the_adapter_trains_when_hidden_states_do_not(chunked: str) -> None:
    """lm_head as the only target: nothing below it has a gradient."""
    _, ours = gradients(logprobs, make_head("everything"), hidden_grad=False)
    _, theirs = gradients(written_out, make_head("everything"), hidden_grad=False)
    assert len(ours) == 2
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", HEADS)
def test_bfloat16_is_as_good_as_the_rounding_of_its_inputs(kind: str, trains: bool, chunked: str) -> None:
    """Against double precision on the same rounded tensors: log-probabilities to 0.05 nats, gradients to 2 %."""
    value_K, ours = gradients(logprobs, make_head(kind, torch.bfloat16, trains=trains))
    assert value_K.dtype == torch.float32

    def in_double(hidden_KD: torch.Tensor, target_K: torch.Tensor, head: Head) -> torch.Tensor:
        low_rank = (head.low_rank[0].double(), head.low_rank[1].double(), head.low_rank[2]) if head.low_rank else None
        bias_V = None if head.bias_V is None else head.bias_V.double()
        wide = replace(head, weight_VD=head.weight_VD.double(), bias_V=bias_V, low_rank=low_rank)
        return written_out(hidden_KD.double(), target_K, wide)

    expected_K, theirs = gradients(in_double, make_head(kind, torch.bfloat16, trains=trains))
    torch.testing.assert_close(value_K.double(), expected_K, rtol=5e-3, atol=5e-2)
    for one, other in zip(ours, theirs):
        assert (one.double() - other.double()).norm() < 2e-2 * other.double().norm()


def test_float32_masters_get_float32_gradients_under_bfloat16_states() -> None:
    """An own copy of the head is kept in float32; its gradient is summed in float32."""
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(V, D, generator=generator).requires_grad_()
    hidden_KD = torch.randn(K, D, generator=generator).bfloat16().requires_grad_()
    logprobs(hidden_KD, torch.arange(K), Head(weight_VD)).sum().backward()
    assert weight_VD.grad is not None
    assert hidden_KD.grad is not None
    assert (weight_VD.grad.dtype, hidden_KD.grad.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("kind", ["plain", "everything"])
@pytest.mark.parametrize("trains", [False, True])
def test_no_rows(kind: str, trains: bool) -> None:
    """A micro-batch without a supervised token: nothing, still connected, gradients zero."""
    head = make_head(kind, trains=trains)
    hidden_KD = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    value_K = logprobs(hidden_KD, torch.zeros(0, dtype=torch.int64), head)
    assert (value_K.shape, value_K.dtype) == ((0,), torch.float64)
    value_K.sum().backward()
    assert hidden_KD.grad is not None
    for parameter in head.trainable:
        if parameter is not None and parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() == 0


def test_the_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of K x V elements is made, forward or backward."""
    monkeypatch.setattr(kernel, "_CHUNK_LOGITS", 5 * V)
    rows: list[int] = []
    raw = Head.raw
    monkeypatch.setattr(Head, "raw", lambda head, hidden: rows.append(len(hidden)) or raw(head, hidden))
    gradients(logprobs, make_head("plain"))
    assert rows == [5, 5, 5, 5, 3]


def test_a_nan_row_stays_alone(chunked: str) -> None:
    """Rows of a diverged job lie in the same chunk as everybody else's."""
    hidden_KD = torch.randn(K, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    broken_KD = hidden_KD.clone()
    broken_KD[7] = float("nan")
    outcomes = []
    for states in (hidden_KD, broken_KD):
        states.requires_grad_()
        value_K = logprobs(states, torch.arange(K), make_head("softcap"))
        value_K.sum().backward()
        assert states.grad is not None
        outcomes.append((value_K.detach(), states.grad))
    others = torch.arange(K) != 7
    assert outcomes[1][0].isnan().sum() == 1
    assert torch.equal(outcomes[0][0][others], outcomes[1][0][others])
    assert torch.equal(outcomes[0][1][others], outcomes[1][1][others])


def test_extreme_logits_stay_finite() -> None:
    """A target with vanishing probability has a log-probability, not -inf, and a gradient."""
    weight_VD = torch.zeros(V, D)
    weight_VD[0] = 100.0
    hidden_KD = torch.full((1, D), 10.0, requires_grad=True)
    value_K = logprobs(hidden_KD, torch.tensor([1]), Head(weight_VD))
    value_K.sum().backward()
    assert value_K.item() == pytest.approx(-12_000.0)
    assert hidden_KD.grad is not None
    assert hidden_KD.grad.isfinite().all()

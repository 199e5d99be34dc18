"""The calls of CUDA's variable-length kernel: on a GPU the kernel itself; elsewhere its documentation, written out.

Without a GPU this shows that what we pass (layouts, boundaries, windows, pages) means what the documentation of
torch.nn.attention.varlen.varlen_attn says it means; with one (`pytest -m gpu`) that the kernel does it.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest
import torch

from lowrank.models.attention import packed, paged
from lowrank.models.attention.packed import Packed, Softmax, attend_documents
from lowrank.models.attention.paged import _KERNEL_PAGE, KVCache, PagedBatch, SequenceChunk

LENGTHS = (7, 1, 32, 33, 300)
SCALE = 0.3
WHERE = [
    pytest.param("cpu", id="documented"),
    pytest.param("torch 2.11", id="documented-2.11"),
    pytest.param("cuda", id="kernel", marks=pytest.mark.gpu),
]
SINCE_2_11 = {"enable_gqa", "seqused_k", "block_table", "num_splits"}


def documented(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """varlen_attn by its documentation: (T_q, H_q, D), (T_k, H_kv, D) or pages of it, -> (T_q, H_q, D)."""
    assert return_aux is None
    assert num_splits is None
    assert enable_gqa or query.shape[1] == key.shape[-2]
    assert cu_seq_q.dtype == torch.int32
    outputs = []
    for index, (first, end) in enumerate(zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:])):
        if block_table is None:
            assert cu_seq_k is not None
            assert cu_seq_k.dtype == torch.int32
            keys, values = (each[cu_seq_k[index] : cu_seq_k[index + 1]] for each in (key, value))
        else:
            assert cu_seq_k is None
            assert block_table.dtype == torch.int32
            assert seqused_k is not None
            assert key.shape[1] % 256 == 0, "pages of flash attention are whole 256 tokens"
            pages = block_table[index].long()
            keys, values = (each[pages].flatten(0, 1)[: seqused_k[index]] for each in (key, value))
        assert end - first <= max_q
        assert len(keys) <= max_k
        distance = torch.arange(len(keys) - (end - first), len(keys))[:, None] - torch.arange(len(keys))
        left, right = window_size
        seen = distance >= -right if right >= 0 else torch.ones_like(distance, dtype=torch.bool)
        seen = seen & (distance <= left) if left >= 0 else seen
        groups = query.shape[1] // keys.shape[1]
        k_HKd, v_HKd = (each.repeat_interleave(groups, 1).transpose(0, 1) for each in (keys, values))
        assert scale is not None
        score = (query[first:end].transpose(0, 1) @ k_HKd.mT * scale).masked_fill(~seen, float("-inf"))
        outputs.append((score.softmax(-1) @ v_HKd).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernel, or what stands for it: with the options of this torch's, or of the oldest supported one's."""
    if request.param == "cuda":
        return "cuda"
    written = inspect.signature(documented).parameters
    real = set(inspect.signature(packed.varlen_attn).parameters)  # type: ignore[arg-type]
    assert real in (set(written), set(written) - SINCE_2_11)
    known = real - SINCE_2_11 if request.param == "torch 2.11" else real
    signature = inspect.Signature([each for name, each in written.items() if name in known])

    def kernel(*given: Any, **named: Any) -> torch.Tensor:
        signature.bind(*given, **named)
        return documented(*given, **named)

    monkeypatch.setattr(kernel, "__signature__", signature, raising=False)
    for module in (packed, paged):
        monkeypatch.setattr(module, "varlen_attn", kernel)
    return "cpu"


def operands(heads: int, total: int, seed: int = 0) -> torch.Tensor:
    """(1, heads, total, 64)."""
    return torch.randn(1, heads, total, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", WHERE, indirect=True)
@pytest.mark.parametrize("window", [None, 5, 1000])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_whole_documents(key_heads: int, window: int | None, device: str) -> None:
    """Output and gradients, against the path of processors in float64."""
    plain = [operands(heads, sum(LENGTHS), seed) for seed, heads in enumerate((4, key_heads, key_heads))]
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    q, k, v = (tensor.to(device, dtype).requires_grad_() for tensor in plain)
    start_S1 = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
    ours = packed._varlen(q, k, v, SCALE, window, Packed(start_S1, LENGTHS))
    exact = [tensor.to(dtype).double().requires_grad_() for tensor in plain]
    expected = attend_documents(*exact, Softmax(SCALE, window), Packed(start_S1.cpu(), LENGTHS))
    outer = operands(sum(LENGTHS), 4, 9)
    given = torch.autograd.grad(ours, (q, k, v), outer.to(device, dtype))
    tolerance = 1e-10 if device == "cpu" else 2e-2
    for one, other in zip((ours, *given), (expected, *torch.autograd.grad(expected, exact, outer.to(dtype).double()))):
        assert (one.cpu().double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("device", WHERE, indirect=True)
@pytest.mark.parametrize("window", [None, 5])
def test_pages_are_read_where_they_lie(window: int | None, device: str) -> None:
    """A sequence that begins, one that goes on by a chunk, one that goes on by a token; in one call."""
    if not paged._kernel_reads_pages():
        pytest.skip("this torch's kernel reads no pages")
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    where = torch.device(device)
    layer = torch.nn.Module()
    outputs = []
    for by_kernel in (True, False):
        cache = KVCache(8, _KERNEL_PAGE)
        for seed, spans in enumerate(
            [
                [SequenceChunk(0, 300, [3, 1], [3, 1]), SequenceChunk(0, 9, [5], [5])],
                [SequenceChunk(300, 20, [3, 1]), SequenceChunk(9, 1, [5]), SequenceChunk(0, 40, [6], [6])],
            ]
        ):
            step = PagedBatch(cache, spans, where)
            step._tables = step._make_tables(where) if by_kernel else None
            total = sum(span.length for span in spans)
            q, k, v = (operands(heads, total, 10 * seed + heads).to(where, dtype) for heads in (4, 2, 2))
            output = step.attend(layer, q, k, v, Softmax(SCALE, window))
            if by_kernel and device == "cpu":  # float64 does not go to the kernel by itself
                output = step._by_kernel(q, *cache.of(layer, k, v), Softmax(SCALE, window))
            outputs.append(output)
    first, second = outputs[:2], outputs[2:]
    tolerance = 1e-10 if device == "cpu" else 2e-2
    for one, other in zip(first, second):
        assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()


@pytest.mark.parametrize("device", WHERE[:2], indirect=True)
def test_a_kernel_without_pages_is_told(device: str, caplog: Any) -> None:
    """Once; the answers come from torch's other attention."""
    paged._notify_once.cache_clear()
    reads = packed.options_of(packed.varlen_attn) >= SINCE_2_11  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "lowrank"):
        assert [paged._kernel_reads_pages() for _ in range(2)] == [reads] * 2
    notices = [each.getMessage() for each in caplog.records]
    assert len(notices) == (not reads)
    assert reads or "takes no block_table, enable_gqa, seqused_k, so it cannot read the pages" in notices[0]

"""Packed (variable-length) attention over a flat stream of documents, through transformers' attention interface.

`register` adds one attention function under the name `lowrank_packed`. The boundaries travel as the
keyword `packed` of the model's forward call; where a model does not pass keywords down to its attention,
the function refuses, and the load-time leak test (models/checks/isolation.py) chooses another path. In the place of
`Packed` may stand a `PagedBatch` of models/attention/paged.py: documents that go on where an earlier call left them.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from lowrank.devices import to_device
from lowrank.kernels.accelerators import AMPERE, capability
from lowrank.kernels.short_attention import short_attention
from lowrank.models.native_masks import FULL, SLIDING

try:  # CUDA's variable-length flash attention, with windows since torch 2.11
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover
    varlen_attn = None

NAME = "lowrank_packed"
_MULTIPLE = 32
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int]], torch.Tensor]
"""(N, H, L, d), (N, G, L, d), (N, G, L, d), which N documents -> (N, H, L, d): attention of documents of one length."""


class AttentionStream(Protocol):
    """A stream that knows by itself what its tokens see (paged.PagedBatch)."""

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Softmax
    ) -> torch.Tensor:
        """(1, H, T, d), (1, G, T, d), (1, G, T, d) -> (1, T, H, d)."""
        ...


@dataclass(frozen=True)
class Softmax:
    """How a layer weighs its scores.

    `window` counts the query itself (transformers' meaning), `softcap` is Gemma 2's, `sinks` are gpt-oss's (one logit
    per head that takes probability and gives no value).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """The fused kernels know all of it."""
        return self.softcap is None and self.sinks is None


class BoundariesMissing(RuntimeError):
    """The model did not pass the document boundaries on to its attention."""


@dataclass(frozen=True)
class Packed:
    """Where documents start in the stream: `start_S1` (int32, cumulative lengths) and the same on the host.

    `prompts`: of each document, how many of its first tokens see one another both ways (a prefix language model's
    prompt); empty: none do. `blocks`: the tokens of pictures that do.
    """

    start_S1: torch.Tensor
    lengths: tuple[int, ...]
    prompts: tuple[int, ...] = ()
    blocks: Blocks | None = None


@dataclass(frozen=True)
class Blocks:
    """Pictures whose tokens see one another both ways.

    block_T   (T) int64: which picture of its document a token is a part of, from 1 on; 0: of none
    layers    in which kinds of layers they do (models/native_masks.py)
    """

    block_T: torch.Tensor
    layers: frozenset[str]

    def of(self, how: Softmax) -> torch.Tensor | None:
        """`block_T` for a layer; None: it does not see so."""
        return self.block_T if (SLIDING if how.window else FULL) in self.layers else None


@functools.cache
def options_of(kernel: Callable[..., Any]) -> frozenset[str]:
    """What a variable-length kernel can be told; torch 2.11's knows no `enable_gqa` and no pages. Looked up once: it
    takes a tenth of a millisecond, and every layer asks."""
    return frozenset(inspect.signature(kernel).parameters)


def register() -> None:
    """Make `lowrank_packed` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed: Packed | AttentionStream | None = None,
    s_aux: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: attention within each document, (1, H, T, d) -> (1, T, H, d)."""
    del attention_mask, unused
    if packed is None:
        raise BoundariesMissing(f"{type(module).__name__} got no document boundaries")
    assert dropout == 0.0, "the frozen base runs in evaluation mode"
    scale = scaling if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    how = Softmax(scale, sliding_window or None, softcap, s_aux)
    if isinstance(packed, Packed):
        return attend_documents(query, key, value, how, packed), None
    return packed.attend(module, query, key, value, how), None


def attend_documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Softmax, packed: Packed
) -> torch.Tensor:
    """Attention of whole documents, causal but for their prompts and pictures: (1, H, T, d), (1, G, T, d),
    (1, G, T, d) -> (1, T, H, d)."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    plain = how.plain and query.shape[-1] == value.shape[-1] <= 256
    block_T = packed.blocks.of(how) if packed.blocks is not None else None
    blocks = None if block_T is None else block_T.split(packed.lengths)
    causal = not packed.prompts and blocks is None
    if causal and query.is_cuda and half and plain and varlen_attn is not None and has_varlen(query.device):
        return _varlen(query, key, value, how.scale, how.window, packed)
    unseen = how.window is None or how.window >= max(packed.lengths)
    if causal and query.device.type == "cpu" and half and plain and unseen:
        q_THd, k_TGd, v_TGd = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return short_attention(q_THd, k_TGd, v_TGd, packed.lengths, how.scale)[None]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, members: Sequence[int]) -> torch.Tensor:
        window = how.window if how.window and how.window < q.shape[2] else None
        mask = None if causal and how.plain and window is None else visible(q.shape[2], window, q.device)
        if mask is not None and packed.prompts:
            mask = mask | _within_prompts([packed.prompts[index] for index in members], q.shape[2], q.device)
        if mask is not None and blocks is not None:
            mask = mask | _within_blocks([blocks[index] for index in members], q.shape[2], window)
        if not how.plain:
            assert mask is not None
            return attend_explicitly(q, k, v, how, mask)
        return _sdpa(q, k, v, how.scale, mask)

    return _by_length(query[0], key[0], value[0], packed.lengths, attend)[None]


def _by_length(
    q_HTd: torch.Tensor, k_GTd: torch.Tensor, v_GTd: torch.Tensor, lengths: tuple[int, ...], attend: Attend
) -> torch.Tensor:
    """`attend` on each document, those of about the same length together: (H, T, d) -> (T, H, d).

    Lengths are rounded up to a multiple of 32: padding behind a document is invisible to it under a causal mask.
    """
    q, k, v = (tensor.split(lengths, dim=1) for tensor in (q_HTd, k_GTd, v_GTd))
    same: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        same.setdefault(-(-length // _MULTIPLE) * _MULTIPLE, []).append(index)
    pieces: list[Any] = [None] * len(lengths)
    for padded, members in same.items():
        own_q, own_k, own_v = (
            torch.stack([F.pad(tensor[index], (0, 0, 0, padded - lengths[index])) for index in members])
            for tensor in (q, k, v)
        )
        for index, output_HLd in zip(members, attend(own_q, own_k, own_v, members).unbind(0)):
            pieces[index] = output_HLd[:, : lengths[index]]
    return torch.cat(pieces, dim=1).transpose(0, 1)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None, packed: Packed
) -> torch.Tensor:
    """One kernel over all documents. transformers' window of w tokens is flash attention's (w - 1, 0)."""
    assert varlen_attn is not None
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    longest = max(packed.lengths)
    window_size = (window - 1 if window else -1, 0)
    options: dict[str, Any] = {}
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in options_of(varlen_attn):
            options["enable_gqa"] = True
        else:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    start_S1 = packed.start_S1
    output = varlen_attn(q, k, v, start_S1, start_S1, longest, longest, scale=scale, window_size=window_size, **options)
    assert isinstance(output, torch.Tensor)
    return output[None]


def visible(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(L, L) boolean: which keys a query sees."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window) if window else distance >= 0


def _within_prompts(prompts: Sequence[int], length: int, device: torch.device) -> torch.Tensor:
    """(N, 1, L, L) boolean: where query and key are both of the prompt of their document."""
    prompt_N = to_device(torch.tensor(prompts), device)
    in_prompt_NL = torch.arange(length, device=device) < prompt_N[:, None]
    return (in_prompt_NL[:, :, None] & in_prompt_NL[:, None, :])[:, None]


def _within_blocks(blocks: Sequence[torch.Tensor], length: int, window: int | None) -> torch.Tensor:
    """(N, 1, L, L) boolean: where query and key are of the same picture, and the key not too far behind."""
    block_NL = torch.stack([F.pad(block_L, (0, length - len(block_L))) for block_L in blocks])
    same_NLL = (block_NL[:, :, None] == block_NL[:, None, :]) & (block_NL > 0)[:, None, :]
    if window:
        place_L = torch.arange(length, device=block_NL.device)
        same_NLL = same_NLL & (place_L[:, None] - place_L[None, :] < window)
    return same_NLL[:, None]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """Causal where there is no mask."""
    if not knows_groups(q, mask):
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def has_varlen(device: torch.device) -> bool:
    """The variable-length kernel runs from Ampere on; older cards (T4, RTX 20) get one call for each length."""
    return capability(device) >= AMPERE


def knows_groups(q: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether torch's fused attention takes query heads that share keys as they are. On a GPU that is flash attention
    alone: NVIDIA's, in 16 bits, without a mask, on Ampere or newer. Otherwise torch would write out all scores (math),
    where its memory-efficient kernel serves as soon as every query head has keys of its own."""
    if q.device.type == "cpu":
        return True
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and mask is None and capability(q.device) >= AMPERE


def attend_explicitly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Softmax, mask: torch.Tensor
) -> torch.Tensor:
    """Softmax attention written out, for what the fused kernels do not know. `mask` is true where a query sees a key.

    (N, H, L, d), (N, G, K, d), (N, G, K, d), (..., L, K) -> (N, H, L, d).
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
    score = (q @ k.transpose(-1, -2)) * how.scale
    if how.softcap is not None:
        score = how.softcap * torch.tanh(score / how.softcap)
    score = score.masked_fill(~mask, float("-inf"))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if how.sinks is None:
        return torch.softmax(score, dim=-1, dtype=wide).to(q.dtype) @ v
    sink = how.sinks.reshape(1, -1, 1, 1).expand(*score.shape[:3], 1).to(score.dtype)
    share = torch.softmax(torch.cat([score, sink], dim=-1), dim=-1, dtype=wide)[..., :-1]
    return share.to(q.dtype) @ v

"""Paged attention: keys and values of earlier tokens lie in pages, the paged KV cache.

A `PagedBatch` is one forward pass over a flat stream in which every sequence has one or more new tokens, after
any number of older ones. It travels through the model as the keyword that carries document boundaries in
training (models/attention/packed.py), so every family that trains packed can be asked, and models/checks/kv_cache.py
asks it. The pages are vLLM's idea (arXiv:2309.06180).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from lowrank.devices import to_device
from lowrank.models.attention.packed import (
    Packed,
    Softmax,
    attend_documents,
    attend_explicitly,
    has_varlen,
    knows_groups,
    options_of,
    varlen_attn,
)
from lowrank.notices import log_notice

_KERNEL_PAGE = 256
"""Tokens of a page that CUDA's flash attention reads without copying."""


class KVCache:
    """Keys and values of every layer in pages of `page_size` tokens; which page is whose is for others to know.

    Page 0 belongs to nobody and stays zero: it stands where a table of pages is filled up.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.layers: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self._through: dict[torch.nn.Module, torch.Tensor] = {}

    def through(self, layer: torch.nn.Module, device: torch.device) -> torch.Tensor:
        """(places) bool, of a layer that not every token goes through: which of the tokens before went."""
        if layer not in self._through:
            self._through[layer] = torch.zeros(self.num_pages * self.page_size, dtype=torch.bool, device=device)
        return self._through[layer]

    def of(self, module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(P, page, G, d) keys and values of a layer; memory is touched page by page as it is written."""
        if module not in self.layers:
            pages = tuple(
                tensor.new_empty(self.num_pages, self.page_size, tensor.shape[1], tensor.shape[3])
                for tensor in (key, value)
            )
            for tensor in pages:
                tensor[0].zero_()
            self.layers[module] = (pages[0], pages[1])
        return self.layers[module]


@dataclass(frozen=True)
class SequenceChunk:
    """New tokens of one sequence: `length` of them after `past` older ones; `pages` have room for all.

    `fresh` are those of its pages that hold nothing of it yet.
    """

    past: int
    length: int
    pages: Sequence[int]
    fresh: Sequence[int] = ()


@dataclass
class _Group:
    """N spans of M new tokens each that see K places of the cache, their last pages filled up."""

    token_M: torch.Tensor
    """Where they stand in the stream, N x M of them."""
    table_NP: torch.Tensor
    position_NM: torch.Tensor
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, page_size: int) -> torch.Tensor:
        """(N, 1, M, K): which places a query sees."""
        if window not in self.masks:
            place_K = torch.arange(self.table_NP.shape[1] * page_size, device=self.table_NP.device)
            distance = self.position_NM[:, None, :, None] - place_K
            self.masks[window] = (distance >= 0) & (distance < window) if window else distance >= 0
        return self.masks[window]


class PagedBatch:
    """Where the tokens of one forward pass stand, and what each sees."""

    def __init__(self, cache: KVCache, spans: Sequence[SequenceChunk], device: torch.device, *, added: int = 0) -> None:
        """`added`: rows at the end of the stream that belong to nobody; they see nothing and leave nothing."""
        self.cache = cache
        self.spans = tuple(spans)
        size = cache.page_size
        own = torch.cat([torch.arange(s.past, s.past + s.length) for s in spans])
        self.num_own = len(own)
        """Rows that belong to somebody."""
        self.position_T = to_device(F.pad(own, (0, added)), device)
        self._place_T = to_device(torch.cat([_places(s.pages, s.past, s.length, size) for s in spans]), device)
        fresh = [page for span in spans for page in span.fresh]
        self._fresh_P = to_device(torch.tensor(fresh), device) if fresh else None
        self._documents: tuple[torch.Tensor | None, Packed] | None = None
        self._groups: list[_Group] = []
        self._tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        if device.type == "cuda" and size % _KERNEL_PAGE == 0 and has_varlen(device) and _kernel_reads_pages():
            self._tables = self._make_tables(device)
        self._split(device)

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Softmax
    ) -> torch.Tensor:
        """Store the new keys and values, and let every query see its own sequence: -> (1, T, H, d)."""
        added = query.shape[2] - self.num_own
        if added:
            query, key, value = (tensor[:, :, : self.num_own] for tensor in (query, key, value))
        output_1THd = self._attend(module, query, key, value, how)
        return F.pad(output_1THd, (0, 0, 0, 0, 0, added)) if added else output_1THd

    def _attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Softmax
    ) -> torch.Tensor:
        keys, values = self.cache.of(module, key, value)
        for pages, new in ((keys, key), (values, value)):
            if self._fresh_P is not None:  # what others left behind must not be there: 0 * NaN is NaN
                pages.index_fill_(0, self._fresh_P, 0)
            pages.view(-1, *pages.shape[2:]).index_copy_(0, self._place_T, new[0].transpose(0, 1))
        plain = how.plain and query.shape[-1] == value.shape[-1] <= 256
        if self._tables is not None and plain and query.dtype in (torch.bfloat16, torch.float16):
            return self._by_kernel(query, keys, values, how)
        output_THd = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        if self._documents is not None:
            token_T, packed = self._documents
            if token_T is None:
                return attend_documents(query, key, value, how, packed)
            q, k, v = (tensor.index_select(2, token_T) for tensor in (query, key, value))
            output_THd.index_copy_(0, token_T, attend_documents(q, k, v, how, packed)[0])
        for group in self._groups:
            output_THd.index_copy_(0, group.token_M, self._attend_group(group, query, keys, values, how))
        return output_THd[None]

    def part(self, layer: torch.nn.Module, chosen_T: torch.Tensor) -> PagedBatch | None:
        """The step of a layer that only these tokens go through; None if nobody does. Its keys and values lie close
        together at the beginning of the pages: each sequence's place there is the number of its tokens that went."""
        through = self.cache.through(layer, chosen_T.device)
        through.index_copy_(0, self._place_T, chosen_T[: self.num_own])
        size, spans, start = self.cache.page_size, [], 0
        for span in self.spans:
            length = int(chosen_T[start : start + span.length].sum())
            start += span.length
            if length:
                before = _places(span.pages, 0, span.past, size).to(through.device)
                past = int(through[before].sum())
                new = slice(-(-past // size), -(-(past + length) // size))
                spans.append(SequenceChunk(past, length, span.pages, span.pages[new]))
        return PagedBatch(self.cache, spans, chosen_T.device) if spans else None

    def written(self) -> list[torch.Tensor]:
        """What this pass left in the cache: (tokens, G, d) keys and values of each layer."""
        pairs = self.cache.layers.values()
        return [pages.view(-1, *pages.shape[2:])[self._place_T] for pair in pairs for pages in pair]

    def _split(self, device: torch.device) -> None:
        """Spans without a past are documents as in training; the others go by how much they see."""
        start = 0
        new: list[tuple[int, SequenceChunk]] = []
        old: list[list[tuple[int, SequenceChunk, int]]] = []
        single: dict[int, list[tuple[int, SequenceChunk, int]]] = {}
        for span in self.spans:
            used = -(-(span.past + span.length) // self.cache.page_size)
            if span.past == 0:
                new.append((start, span))
            elif span.length == 1:  # of about the same length together, at most half of it filled up
                single.setdefault((used - 1).bit_length(), []).append((start, span, used))
            else:
                old.append([(start, span, used)])
            start += span.length
        if new:
            lengths = tuple(span.length for _, span in new)
            token_T = torch.cat([torch.arange(first, first + span.length) for first, span in new])
            starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
            everything = len(new) == len(self.spans)
            self._documents = (
                None if everything else to_device(token_T, device),
                Packed(to_device(starts, device), lengths),
            )
        for members in [*old, *single.values()]:
            most = max(used for *_, used in members)
            table = [[*span.pages[:used], *[0] * (most - used)] for _, span, used in members]
            token_M = to_device(
                torch.cat([torch.arange(first, first + span.length) for first, span, _ in members]), device
            )
            position_NM = self.position_T[token_M].view(len(members), -1)
            self._groups.append(_Group(token_M, to_device(torch.tensor(table), device), position_NM))

    def _attend_group(
        self, group: _Group, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Softmax
    ) -> torch.Tensor:
        """(N x M, H, d)."""
        num, pages = group.table_NP.shape
        heads, width = query.shape[1], query.shape[3]
        k, v = (
            each.view(len(each), -1)
            .index_select(0, group.table_NP.view(-1))
            .view(num, pages * self.cache.page_size, *each.shape[2:])
            .transpose(1, 2)
            for each in (keys, values)
        )
        q = query[0].index_select(1, group.token_M).transpose(0, 1).view(num, -1, heads, width).transpose(1, 2)
        mask = group.mask(how.window, self.cache.page_size)
        if not how.plain:
            output = attend_explicitly(q, k, v, how, mask)
        elif q.shape[2] == 1:  # the query heads that share a key head are queries that see the same
            q = q.reshape(num, k.shape[1], heads // k.shape[1], width)
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=how.scale)
            output = output.reshape(num, heads, 1, -1)
        else:
            if not knows_groups(q, mask):
                k, v = (each.repeat_interleave(heads // k.shape[1], dim=1) for each in (k, v))
            grouped = k.shape[1] != heads
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=how.scale, enable_gqa=grouped)
        return output.transpose(1, 2).reshape(len(group.token_M), heads, -1)

    def _make_tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(starts in the stream, tokens of each sequence in the cache, pages of each), for the kernel."""
        start_S1 = torch.tensor([0, *torch.tensor([s.length for s in self.spans]).cumsum(0).tolist()])
        seen_S = torch.tensor([s.past + s.length for s in self.spans])
        most = max(len(s.pages) for s in self.spans)
        table_SP = torch.tensor([[*s.pages, *[0] * (most - len(s.pages))] for s in self.spans])
        start, seen, table = (to_device(each.int(), device) for each in (start_S1, seen_S, table_SP))
        return start, seen, table

    def _by_kernel(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, how: Softmax) -> torch.Tensor:
        """All sequences in one kernel, which reads the pages where they lie."""
        assert self._tables is not None
        assert varlen_attn is not None
        start_S1, seen_S, table_SP = self._tables
        output = varlen_attn(
            query[0].transpose(0, 1),
            keys,
            values,
            start_S1,
            None,
            max(span.length for span in self.spans),
            max(span.past + span.length for span in self.spans),
            scale=how.scale,
            window_size=(how.window - 1 if how.window else -1, 0),
            seqused_k=seen_S,
            block_table=table_SP,
            enable_gqa=keys.shape[2] != query.shape[1],
        )
        assert isinstance(output, torch.Tensor)
        return output[None]


class InGraph:
    """The stream that compiled layers see, the same object in every step: attention is an operator to them, and which
    step it is of, and of which layer, is not in their graph."""

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Softmax
    ) -> torch.Tensor:
        """(1, H, T, d), (1, G, T, d), (1, G, T, d) -> (1, T, H, d)."""
        del module
        return torch.ops.lowrank.attend_pages(query, key, value, how.scale, how.window, how.softcap, how.sinks)

    @contextlib.contextmanager
    def running(self, batch: PagedBatch) -> Generator[None, None, None]:
        """Inside, layers that see this stream are in the pass of `batch`, which no pass before was the first of its
        cache: layers ask in the order in which they first did."""
        _running.batch, _running.layers = batch, iter(list(batch.cache.layers))
        try:
            yield
        finally:
            del _running.batch, _running.layers


_running = threading.local()
"""The pass that this thread's compiled layers are in: operators are given tensors and numbers, nothing else."""


def _attend_pages(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`PagedBatch.attend` of the pass that is running. It writes the cache, which no graph ever sees."""
    layer = next(_running.layers)
    return _running.batch.attend(layer, query, key, value, Softmax(scale, window, softcap, sinks))


def _like_attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *how: object) -> torch.Tensor:
    """What the operator gives, as a compiler sees it."""
    del key, how
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])


_OPERATORS = torch.library.Library("lowrank", "FRAGMENT")
_OPERATORS.define(
    "attend_pages(Tensor query, Tensor key, Tensor value, float scale, int? window, float? softcap, Tensor? sinks)"
    " -> Tensor",
    # No CUDA graph holds it: how long sequences are is a number to its kernels.
    tags=[torch.Tag.cudagraph_unsafe],
)
_OPERATORS.impl("attend_pages", _attend_pages, "CompositeExplicitAutograd")
torch.library.register_fake("lowrank::attend_pages", _like_attended, lib=_OPERATORS)


def _kernel_reads_pages() -> bool:
    """Not every torch that has the kernel has it with pages; a person is told that answers would be faster with one
    that does."""
    if varlen_attn is None:
        return False
    lacking = {"block_table", "enable_gqa", "seqused_k"} - options_of(varlen_attn)
    if lacking:
        _notify_once(
            f"the variable-length attention of torch {torch.__version__} takes no {', '.join(sorted(lacking))}, so it "
            "cannot read the pages of the KV cache (2.13 can): answers use torch's other attention, which is slower"
        )
    return not lacking


@functools.cache
def _notify_once(text: str) -> None:
    log_notice(text)


def _places(pages: Sequence[int], first: int, length: int, size: int) -> torch.Tensor:
    """Where tokens [first, first + length) of a sequence lie in the cache."""
    own = torch.arange(first, first + length)
    return torch.as_tensor(pages)[own // size] * size + own % size

"""Answering through compiled decoder layers: `--compile`, `lowrank.load(..., compile=True)`, `objective.compile`.

torch.compile makes one kernel of what lies between two products (norms, rotary embedding, gates, residuals), and on
NVIDIA's GPUs CUDA graphs, so that a step is not waiting for Python to launch a thousand small kernels. Layers are
compiled one by one and share what was compiled; the model's own code around them runs as ever. Attention over pages,
the adapters' updates and products with packed weights are operators in it (`attend_pages`, `add_updates_by_row`,
`packed_product`), so that neither longer sequences nor other adapters compile anything anew; other numbers of rows do
it once, from one row to many.

Nothing is believed: the first step of every number of rows and slots (with CUDA graphs, until one was replayed) is made
plainly as well, and hidden states, keys and values are compared. Where they differ, or anything goes wrong, it says so
and answers go on plainly.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Hashable
from dataclasses import replace
from typing import Any

import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.linear import RoutedLinear
from lowrank.adapters.routing import ForwardContext
from lowrank.kernels.accelerators import is_nvidia
from lowrank.kernels.decode_lora import groups_of
from lowrank.models.attention.paged import InGraph, PagedBatch
from lowrank.models.base import Base
from lowrank.models.checks.isolation import distance, tolerance
from lowrank.models.layers import decoder_layers
from lowrank.models.storages.in_graph import put_in_graphs
from lowrank.notices import log_notice

_GRAPHS = 64
"""torch compiles a layer anew for one row and for many, without adapters, with one and with several, and for each kind
of layer; it gives up after eight if nobody says otherwise."""

_UNTIL_REPLAYED = 3
"""torch runs what a CUDA graph is to hold as it is, then records it, and replays it from the third time on."""

_CALL = "_compiled_call_impl"
"""Where `nn.Module.compile` puts what calls of the module go through from then on. Training, questions and the plain
step go through the layers as they are, so it is there for one step at a time."""


class CompiledDecoding:
    """The compiled layers of one base, for any number of generators, one after another. `problem`: why none are used
    (any more), in words."""

    def __init__(
        self, base: Base, bank: Bank, notify: Callable[[str], None] = log_notice, backend: Any = "inductor"
    ) -> None:
        """`backend`: torch.compile's."""
        self._base, self._bank, self._notify, self._backend = base, bank, notify, backend
        self.problem: str | None = None
        self._stream = InGraph()
        self._left_out = False
        self._linears: tuple[int, list[RoutedLinear]] = -1, []
        """With `Bank.times_added` when they were looked for."""
        self._compared: Counter[Hashable] = Counter()
        self._calls: dict[Any, Any] = {}
        reason = _why_not(base)
        if reason is not None:
            self.give_up(reason)

    def hidden(self, token_T: torch.Tensor, batch: PagedBatch, context: ForwardContext) -> torch.Tensor | None:
        """(T, D) last hidden states of a step of one new token for each sequence, in `context`; None: make it plainly.

        What it wrote into the cache before it gave up, the plain step writes again.
        """
        if self.problem is not None or not batch.cache.layers:  # the first pass of a cache tells its layers
            return None
        slots = tuple(slot for slot, _, _ in context.ranges if slot >= 0)
        if not self._put_side_by_side(slots):
            if not self._left_out:
                self._notify("compiled layers know low-rank updates of linear layers; others are answered plainly")
            self._left_out = True
            return None
        rows = tuple((first, end) for slot, first, end in context.ranges if slot >= 0)
        by_row = replace(context, group_T=groups_of(rows, len(token_T), token_T.device))
        try:
            with self._bank.routing.using(by_row), self._compiled_layers(), self._stream.running(batch):
                position_1T = batch.position_T[None]
                hidden_TD = self._base.call(token_T[None], position_ids=position_1T, packed=self._stream)[0]
            code = len(token_T), len(slots), tuple(each.shape_side_by_side for each in self._linears[1])
            if self._compared[code] < (_UNTIL_REPLAYED if self._has_graphs else 1):
                self._compare(hidden_TD, token_T, batch, context, code)
        except Exception as error:  # compilers and drivers raise what they like, and there is the plain step
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self.give_up(f"{type(error).__name__}: {' '.join(lines[:3])[:400]}")
            return None
        return hidden_TD if self.problem is None else None

    def _compare(
        self,
        hidden_TD: torch.Tensor,
        token_T: torch.Tensor,
        batch: PagedBatch,
        context: ForwardContext,
        code: Hashable,
    ) -> None:
        """Give up if the plain step, made after it, gives other values."""
        own, written = hidden_TD[: batch.num_own].clone(), batch.written()
        with self._bank.routing.using(context):
            plain_TD = self._base.forward_with_kv_cache(token_T, batch)
        apart = 0.0
        for ours, plain in [(own, plain_TD[: batch.num_own]), *zip(written, batch.written())]:
            sound_T = plain.flatten(1).isfinite().all(1)  # an adapter may have diverged: its rows say nothing
            if not bool(sound_T.any()):
                return
            apart = max(apart, distance(ours[sound_T], plain[sound_T]))
        if apart > tolerance(self._base):
            self.give_up(f"a step of {len(token_T)} rows gives other values (by {apart:.1e})")
        self._compared[code] += 1

    def _put_side_by_side(self, slots: tuple[int, ...]) -> bool:
        """Have each layer hold what these slots have there; False if one of them has more than low-rank updates of
        linear layers."""
        own = [self._bank.slots[slot] for slot in slots]
        if self._base.inject_kv is not None or self._bank.blocks.found or any(e.experts or e.copies for e in own):
            return False
        x_0D = torch.empty(0, 0, dtype=self._base.dtype, device=self._base.device)
        if self._linears[0] != self._bank.times_added:  # a new adapter may have wrapped more of them
            found = [each for each in self._base.backbone.modules() if isinstance(each, RoutedLinear)]
            self._linears = self._bank.times_added, found
            self._compared.clear()
        return all(each.put_side_by_side(slots, x_0D) for each in self._linears[1])

    @contextlib.contextmanager
    def _compiled_layers(self) -> Generator[None, None, None]:
        """Inside, the decoder layers are the compiled ones."""
        layers = decoder_layers(self._base.model)
        assert layers is not None, "checked before"
        if not self._calls:
            put_in_graphs(self._base.model)
            options = {"triton.cudagraphs": True} if self._has_graphs else None
            for layer in layers:
                layer.compile(fullgraph=True, dynamic=True, backend=self._backend, options=options)
                self._calls[layer] = getattr(layer, _CALL)
                setattr(layer, _CALL, None)
        if is_nvidia(self._base.device):
            torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(recompile_limit=_GRAPHS):  # pyright: ignore
            try:
                for layer, call in self._calls.items():
                    setattr(layer, _CALL, call)
                yield
            finally:
                for layer in self._calls:
                    setattr(layer, _CALL, None)

    @property
    def _has_graphs(self) -> bool:
        return self._backend == "inductor" and is_nvidia(self._base.device)

    def give_up(self, reason: str) -> None:
        """Answer plainly from now on, and say why, once."""
        if self.problem is not None:
            return
        self.problem = reason
        self._notify(f"answers are not computed by compiled layers: {reason}")


def _why_not(base: Base) -> str | None:
    """What stands against it before anything is tried."""
    if decoder_layers(base.model) is None:
        return "the model has no single list of decoder layers"
    if base.placement.moves_layers:
        return "the weights of its layers come and go"
    if base.layer_wrapper is not None:
        return "a method of its own is wrapped around its layers"
    return None

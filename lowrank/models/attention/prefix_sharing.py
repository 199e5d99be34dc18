"""Prefix sharing in training: answers to one prompt, after one computation of the prompt.

The two answers of a pair, or the answers that a model draws to one question, begin with the same tokens. So only the
first of them goes through the model whole; of the others a tail does: `Segment.prefix` says how many tokens of the last
whole segment come before its own. Every part of a model that is packed works token by token, but for its attention,
which reads the prompt's keys and values from where they are. What is computed is the same, to rounding; of dropout and
noise, the draws of the first answer's prompt serve all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lowrank.devices import to_device
from lowrank.models.attention.packed import Blocks, Packed, Softmax, attend_documents
from lowrank.segments import Segment

Move = Callable[[torch.Tensor], torch.Tensor]
_WORTH_IT = 0.05
"""Share of a document that must be shared; below, gathering keys costs what the shared tokens would."""


def tail_of(segment: Segment, whole: Segment) -> Segment:
    """`segment` without the tokens it shares with `whole`, as far as none of them is learned; else as it is.

    The last of the shared tokens stays: the first token of the answer is predicted from it. Documents with pictures
    stay whole: equal placeholders may stand for different ones. So do those of which another part asks, which a prefix
    language model reads otherwise.
    """
    if segment.media is not None or whole.media is not None or segment.prompt_length != whole.prompt_length:
        return segment
    same_pair = segment.pair >= 0 and segment.pair == whole.pair
    if not same_pair and not (segment.signals_L and whole.signals_L):
        return segment
    reach = min(len(segment), len(whole))
    differs = segment.token_L[:reach] != whole.token_L[:reach]
    learned = segment.weight_L[:reach] != 0
    differs |= learned
    prefix = int(differs.argmax()) if differs.any() else reach
    prefix = min(prefix, len(segment) - 1) - 1
    return _cut(segment, prefix) if prefix > len(segment) * _WORTH_IT else segment


def _cut(segment: Segment, prefix: int) -> Segment:
    def rest(value_L: np.ndarray) -> np.ndarray:
        return value_L[prefix:]

    return replace(
        segment,
        token_L=rest(segment.token_L),
        weight_L=rest(segment.weight_L),
        reference_L=None if segment.reference_L is None else rest(segment.reference_L),
        signals_L={name: rest(value_L) for name, value_L in segment.signals_L.items()},
        prefix=prefix,
        prompt=None if segment.prompt is None else segment.prompt - prefix,
    )


class SharedPrompts:
    """Where the documents of a stream with tails stand. Stands in the place of `Packed` (models/attention/packed.py).

    Attention runs over whole documents, the shared tokens gathered for each: a few per cent of a layer's work, and any
    kernel can do it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        prefixes: Sequence[int],
        device: torch.device,
        prompts: tuple[int, ...] = (),
        blocks: Blocks | None = None,
    ) -> None:
        """`prompts`, `blocks`: see `Packed`; the latter of the stream."""
        self._pieces: list[tuple[int, int]] = []
        """(first row of the stream, rows) of what documents are made of, in order."""
        self._own: list[tuple[int, int]] = []
        """(first row of the documents, rows) of each segment's own."""
        self._borrowed: list[tuple[int, int, int]] = []
        """(first row of the stream, first row of the documents, rows) of what is there once more."""
        start = whole = place = 0
        for length, prefix in zip(lengths, prefixes):
            whole = whole if prefix else start
            if prefix:
                self._pieces.append((whole, prefix))
                self._borrowed.append((whole, place, prefix))
            self._pieces.append((start, length))
            self._own.append((place + prefix, length))
            start, place = start + length, place + prefix + length
        documents = tuple(length + prefix for length, prefix in zip(lengths, prefixes))
        if blocks is not None:
            blocks = Blocks(torch.cat([blocks.block_T.narrow(0, *piece) for piece in self._pieces]), blocks.layers)
        start_S1 = to_device(torch.tensor([0, *documents]).cumsum(0).int(), device)
        self._packed = Packed(start_S1, documents, prompts, blocks)

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Softmax
    ) -> torch.Tensor:
        """(1, H, T, d), (1, G, T, d), (1, G, T, d) -> (1, T, H, d)."""
        del module
        whole = [_Moved.apply(each, self.gather, self.scatter) for each in (query, key, value)]
        attended = attend_documents(whole[0], whole[1], whole[2], how, self._packed)
        return _Moved.apply(attended, self.own, self.expand)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """(1, H, T, d) -> (1, H, P, d): the P rows of all documents, shared ones in each."""
        return torch.cat([x.narrow(2, *piece) for piece in self._pieces], dim=2)

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """The transpose of `gather`. In a fixed order, so that a step gives the same bits every time."""
        total = torch.cat([x.narrow(2, *piece) for piece in self._own], dim=2)
        for whole, place, length in self._borrowed:
            total.narrow(2, whole, length).add_(x.narrow(2, place, length))
        return total

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """(1, P, H, d) -> (1, T, H, d): without what is there once more."""
        return torch.cat([x.narrow(1, *piece) for piece in self._own], dim=1)

    def expand(self, x: torch.Tensor) -> torch.Tensor:
        """The transpose of `own`."""
        start, last = 0, self._own[-1]
        whole = x.new_zeros(x.shape[0], sum(last), *x.shape[2:])
        for place, length in self._own:
            whole.narrow(1, place, length).copy_(x.narrow(1, start, length))
            start += length
        return whole


class _Moved(torch.autograd.Function):
    """Rows moved by a linear map, and their gradients by its transpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, move: Move, back: Move) -> torch.Tensor:
        ctx.back = back
        return move(x)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        return ctx.back(outer[0]), None, None

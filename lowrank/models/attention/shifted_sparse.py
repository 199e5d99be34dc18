"""Shifted sparse attention (S2-Attn) of LongLoRA (arXiv:2309.12307): long documents for the price of short ones.

In training, one half of the heads attends within groups of g tokens of a document, the other half within groups that
are shifted by g / 2, so that what one half cannot see across a boundary the other can. Evaluation and generation attend
to everything, which the model does not have to learn anew. The first and last shifted group of a document are short,
as in the authors' code with flash attention: rolled around, as in their figure, its end would see its beginning.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lowrank.devices import to_device
from lowrank.models.attention.packed import Packed, Softmax, attend_documents


class ShiftedSparse:
    """Documents of `lengths` in groups of `size` tokens (even). Stands in the place of `Packed`
    (models/attention/packed.py)."""

    def __init__(self, lengths: tuple[int, ...], size: int, device: torch.device) -> None:
        self._straight = _boundaries(lengths, size, size, device)
        self._shifted = _boundaries(lengths, size // 2, size, device)

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Softmax
    ) -> torch.Tensor:
        """(1, H, T, d), (1, G, T, d), (1, G, T, d) -> (1, T, H, d): causal attention, each half of the heads by itself.

        With an odd number of heads the first half is the smaller one.
        """
        del module
        heads, groups = query.shape[1], key.shape[1]
        half = heads // 2
        if half == 0:
            return attend_documents(query, key, value, how, self._shifted)
        if half % (heads // groups):  # the halves share a key head: each gets its own copy
            key, value = (each.repeat_interleave(heads // groups, dim=1) for each in (key, value))
        middle = half * key.shape[1] // heads
        sinks = (None, None) if how.sinks is None else (how.sinks[:half], how.sinks[half:])
        outputs = [
            attend_documents(query[:, own], key[:, keys], value[:, keys], replace(how, sinks=sink), packed)
            for own, keys, sink, packed in (
                (slice(half), slice(middle), sinks[0], self._straight),
                (slice(half, None), slice(middle, None), sinks[1], self._shifted),
            )
        ]
        return torch.cat(outputs, dim=2)


def groups_of(length: int, first: int, size: int) -> list[int]:
    """Lengths of the groups a document is cut into; the first has `first` tokens, where there are so many."""
    ends = [*range(first, length, size), length]
    return [end - start for start, end in zip([0, *ends], ends)]


def _boundaries(lengths: tuple[int, ...], first: int, size: int, device: torch.device) -> Packed:
    pieces = tuple(piece for length in lengths for piece in groups_of(length, first, size))
    return Packed(to_device(torch.tensor([0, *pieces]).cumsum(0).int(), device), pieces)

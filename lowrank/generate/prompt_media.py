"""Encodes the media of sequences: the vision tower runs once for each medium, and sequences with the same one share its
features."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lowrank.adapters.bank import Bank
from lowrank.adapters.routing import ForwardContext
from lowrank.errors import LowrankError
from lowrank.generate.sequence import GenerationSequence
from lowrank.models.base import Base
from lowrank.models.media_encoder import EncodedChunk


def encode_media(
    base: Base, bank: Bank, sequences: Iterable[GenerationSequence], running: list[GenerationSequence]
) -> None:
    """Let the tower look at the pictures of those who have some. Whose cannot be looked at ends here, and nobody else.
    `running`: who may have been shown the same already."""
    for sequence in sequences:
        if sequence.media is None or sequence.encoded is not None:
            continue
        same = (each.encoded for each in running if each.has_prompt_of(sequence) and _see_alike(bank, each, sequence))
        sequence.encoded = next((seen for seen in same if seen is not None), None)
        if sequence.encoded is None:
            try:
                _show(base, bank, sequence)
            except LowrankError as error:
                sequence.fail("error", str(error), refused=True)


def encoded_chunks(plan: list[tuple[GenerationSequence, int]]) -> list[EncodedChunk]:
    """Where the tokens of a step (so many of each sequence) are in documents with pictures; empty where nobody has
    some."""
    if all(sequence.media is None for sequence, _ in plan):
        return []
    return [EncodedChunk(sequence.cached, length, sequence.encoded) for sequence, length in plan]


def _see_alike(bank: Bank, one: GenerationSequence, other: GenerationSequence) -> bool:
    """Whether their slots have the same tower."""
    return one.slot == other.slot or not (_adapts_tower(bank, one.slot) or _adapts_tower(bank, other.slot))


def _adapts_tower(bank: Bank, slot: int) -> bool:
    return slot in bank.slots and bank.slots[slot].adapts_tower


def _show(base: Base, bank: Bank, sequence: GenerationSequence) -> None:
    assert base.media_encoder is not None, "checked when it was submitted"
    assert sequence.media is not None
    prompt_L = np.asarray(sequence.tokens[: sequence.num_prompt], np.int64)
    with bank.routing.using(ForwardContext()):
        sequence.encoded = base.media_encoder.encode(prompt_L, sequence.media, sequence.slot)

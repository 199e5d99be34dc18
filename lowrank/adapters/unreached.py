"""Targets of adapters that no forward pass of the model comes by: they would stay as they began, without a word.

A model may have layers that its documents never run (towers for sound, for pictures where there are none, heads for
tokens further on), or compute with a layer's weight without calling the layer. Neither shows in names; short documents
through the base show both.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.slot import Slot
from lowrank.adapters.targets import name_of
from lowrank.batches import BASE_SLOT, pack
from lowrank.models.base import Base
from lowrank.models.checks.media_isolation import made_up_documents
from lowrank.segments import Segment

_TOKENS = 4


def unreached(bank: Bank, slots: Iterable[int]) -> dict[int, list[str]]:
    """By slot, the full names of what its adapter is on and a pass of the base does not call; slots without any are
    left out. The head counts as called: the loss computes with it."""
    model = bank.base.model
    head = name_of(model, model.get_output_embeddings())
    targets = {slot: _targets(bank.slots[slot]) - {head} for slot in slots if slot != BASE_SLOT}
    called: set[str] = set()

    def note_call(name: str, module: Any, args: Any) -> None:
        del module, args
        called.add(name)

    wanted = set().union(*targets.values())
    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(note_call, name)) for name in wanted]
    try:
        if hooks:
            media_encoder = bank.base.media_encoder
            with torch.no_grad(), media_encoder.uncached() if media_encoder is not None else nullcontext():
                for document in _documents(bank.base):
                    bank.hidden(pack([(BASE_SLOT, document)]).to(bank.base.device))
    finally:
        for hook in hooks:
            hook.remove()
    missed = {slot: sorted(names - called) for slot, names in targets.items()}
    return {slot: names for slot, names in missed.items() if names}


def _targets(slot: Slot) -> set[str]:
    """Modules that the slot has something on."""
    experts = {name.rpartition(".")[0] for name in slot.experts}
    return {name for name in slot.ranks if name not in slot.experts} | experts | set(slot.copies)


def num_targets(slot: Slot) -> int:
    """How many modules a slot has something on."""
    return len(_targets(slot))


def _documents(base: Base) -> list[Segment]:
    """A text; and one with a medium of each kind that the base takes."""
    text = Segment(np.arange(_TOKENS, dtype=np.int64), np.zeros(_TOKENS, np.float32))
    kinds = base.media_encoder.kinds if base.media_encoder is not None else ()
    return [text, *(made_up_documents(base, kind)[1] for kind in kinds)]

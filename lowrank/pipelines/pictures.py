"""Bases that are shown pictures: told apart from those that read text, and tried out before anything is trained."""

from __future__ import annotations

from collections.abc import Callable

from lowrank.errors import ModelError
from lowrank.media.processor import processor_of
from lowrank.models.base import Base
from lowrank.models.checks.sight import give_sight


def see(base: Base, attention: str, notify: Callable[[str], None], *, running: bool = False) -> None:
    """Let `base` be shown pictures, if it is not yet. `attention`: the setting; `running`: somebody uses the base
    already, so that its layout stays.

    ModelError where it cannot, in any layout.
    """
    if base.sight is not None:
        return
    processor = processor_of(base.tokenizer)
    if processor is None or not processor.sees:
        raise ModelError(f"{base.name} has no tower for pictures, or not the files of its processor")
    notice = give_sight(base, processor, attention, settle=not running)
    if notice:
        notify(notice)

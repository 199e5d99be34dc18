"""Bases that are shown pictures and played sounds: told apart from those that read text, and tried out before anything
is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lowrank.data.batching.dataloader import StreamingDataLoader
from lowrank.errors import ModelError
from lowrank.media.processor import processor_of
from lowrank.models.base import Base
from lowrank.models.checks.media_isolation import give_media_encoder
from lowrank.models.feature_cache import open_feature_cache
from lowrank.records import KIND_NAMES


def attach_media_encoder(
    base: Base,
    attention: str,
    notify: Callable[[str], None],
    *,
    kinds: Sequence[str] = ("image",),
    running: bool = False,
    answering: bool = False,
    cache_features: bool = False,
) -> None:
    """Let `base` be given media of these kinds, if it is not yet. `attention`: the setting; `running`: somebody uses
    the base already, so that its layout stays. `answering`: nothing is trained, so that only documents with media need
    go through in another. `cache_features`: the setting model.cache_vision_features.

    ModelError where it cannot, in any layout.
    """
    known = base.media_encoder.kinds if base.media_encoder is not None else ()
    if set(kinds) <= set(known):
        return
    processor = processor_of(base.tokenizer)
    missing = next((kind for kind in kinds if processor is None or kind not in processor.kinds), None)
    if processor is None or missing is not None:
        names = KIND_NAMES[missing or kinds[0]]
        raise ModelError(f"{base.name} has no tower for {names}, or not the files of its processor")
    every = [kind for kind in KIND_NAMES if kind in known or kind in kinds]
    cache = base.media_encoder.feature_cache if base.media_encoder is not None else None
    notice = give_media_encoder(base, processor, attention, kinds=every, settle=not running, answering=answering)
    if notice:
        notify(notice)
    assert base.media_encoder is not None
    if cache_features and cache is None and {"image", "video"} & set(every):
        cache = open_feature_cache(base, notify)
        notify(cache.describe())
    base.media_encoder.feature_cache = cache  # now: what the base was tried out with is nobody's


class Attach(Protocol):
    """`attach_media_encoder` of a base with the settings of its run."""

    def __call__(self, *, kinds: Sequence[str], running: bool) -> None: ...


def expect_media(
    base: Base, streams: Sequence[StreamingDataLoader], attach: Attach, notify: Callable[[str], None]
) -> None:
    """Let `base` be given what a stream may have further on, though none of the rows that were read so far has it.

    Where that would change its layout, or is not possible here, such rows are left out of the streams, which is said.
    """
    processor = processor_of(base.tokenizer)
    for kind in processor.kinds if processor is not None else ():
        try:
            attach(kinds=(kind,), running=True)
        except ModelError as error:
            assert processor is not None
            names = KIND_NAMES[kind]
            notify(
                f"no row that was read of the stream so far has {names}; those with some further on are left out, "
                f"since {error}. Should they be learned, put a row with {names} among the first"
            )
            processor.leave_out(kind)
            for stream in streams:
                stream.load_state(stream.state())  # what it has read already may hold some

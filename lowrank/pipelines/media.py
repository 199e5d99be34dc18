"""Media encoders of a base: attached and tried out before anything is trained, where the data have pictures, videos or
sounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from lowrank.data.batching.dataloader import StreamingDataLoader
from lowrank.data.prepare import Prepared
from lowrank.errors import ModelError
from lowrank.media.processor import processor_of
from lowrank.models.base import Base
from lowrank.models.checks.media_isolation import give_media_encoder
from lowrank.models.config import ModelConfig
from lowrank.models.feature_cache import open_feature_cache
from lowrank.records import KIND_NAMES
from lowrank.report.events import Event, Notice


def prepare_media(
    base: Base,
    model: ModelConfig,
    data: Sequence[Prepared],
    report: Callable[[Event], None],
    *,
    running: bool = False,
) -> None:
    """Attach the media encoder of `base` for the kinds of media that `data` has, and for those that its streams may
    still have. `running`: the base is in use, so its layout stays. ModelError for media that the base cannot take."""
    attach = partial(
        attach_media_encoder,
        base,
        model.attention,
        lambda text: report(Notice(text)),
        cache_features=model.cache_vision_features,
    )
    kinds = [kind for kind in KIND_NAMES if any(kind in each.media_kinds for each in data)]
    if kinds:
        attach(kinds=kinds, running=running)
    streams = [each.train for each in data if isinstance(each.train, StreamingDataLoader)]
    if streams:
        expect_media(base, streams, attach, lambda text: report(Notice(text, level="warning")))


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
    """Attach the media encoder of `base` for media of these kinds, unless it is attached already. `attention`: the
    setting model.attention; `running`: the base is in use, so its layout stays; `answering`: nothing is trained, so
    only documents with media need another layout; `cache_features`: the setting model.cache_vision_features.

    ModelError where the base cannot take such media, or isolates documents with them in no layout.
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
    notice = give_media_encoder(
        base, processor, attention, kinds=every, may_change_layout=not running, answering=answering
    )
    if notice:
        notify(notice)
    assert base.media_encoder is not None
    if cache_features and cache is None and {"image", "video"} & set(every):
        cache = open_feature_cache(base, notify)
        notify(cache.describe())
    base.media_encoder.feature_cache = cache  # after the trial, whose media do not belong into the cache


class Attach(Protocol):
    """`attach_media_encoder` of a base with the settings of its run."""

    def __call__(self, *, kinds: Sequence[str], running: bool) -> None: ...


def expect_media(
    base: Base, streams: Sequence[StreamingDataLoader], attach: Attach, notify: Callable[[str], None]
) -> None:
    """Attach the media encoder for kinds that a stream may still have, though none of the rows read so far has them.

    Where that would change the base's layout, or is not possible here, such rows are skipped, with a notice.
    """
    processor = processor_of(base.tokenizer)
    for kind in processor.kinds if processor is not None else ():
        try:
            attach(kinds=(kind,), running=True)
        except ModelError as error:
            assert processor is not None
            names = KIND_NAMES[kind]
            notify(
                f"none of the rows read so far from the stream has {names}; later rows with {names} will be skipped "
                f"because {error}. To train on them put one among the first rows"
            )
            processor.leave_out(kind)
            for stream in streams:
                stream.load_state(stream.state())  # what it has read already may hold some

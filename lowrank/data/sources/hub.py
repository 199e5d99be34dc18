"""Rows of a dataset on the hub; where the hub cannot be reached, of the copy that is already here."""

from __future__ import annotations

import logging
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowrank.data.sources.places import TEXT_AS_ROWS, shown
from lowrank.data.sources.undecoded import undecoded_rows
from lowrank.errors import DataError
from lowrank.hub_reach import cache_alone, unreachable

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def rows_of(path: str, split: str, subset: str | None, streaming: bool) -> Iterator[dict[str, Any]]:
    """The rows of the dataset called `path`. DataError, in one sentence and without waiting, if it cannot be had."""
    import datasets  # takes as long to import as torch, and only hub names need it

    away = unreachable(path, "datasets")
    what = f"(split {split!r}{f', subset {subset!r}' if subset else ''})"
    try:
        with _quiet(), _offline(away is not None):
            dataset = datasets.load_dataset(path, name=subset, split=split, streaming=streaming and away is None)
    except Exception as error:  # whatever the network, the hub, or a data file there brings
        detail = away or " ".join(str(error).split())[:300]
        detail += "" if "/" in path else f"; {TEXT_AS_ROWS}"
        raise DataError(
            f"there is no file or folder {shown(path)}, and {path!r} cannot be loaded from the hub {what}: {detail}"
        ) from error
    yield from undecoded_rows(dataset)


def folder_of_files() -> tuple[Path, tuple[str, ...]]:
    """The folder that holds the files of media in rows of the hub, which reach none elsewhere on this machine; and the
    only folders in it that they reach (none: all), since the person's token lies beside them."""
    import datasets.config
    from huggingface_hub import constants

    home, own = Path(constants.HF_HOME), Path(datasets.config.HF_DATASETS_CACHE)
    caches = (Path(constants.HF_HUB_CACHE), own)
    if all(home in cache.parents for cache in caches):
        return home, tuple(cache.relative_to(home).parts[0] for cache in caches)
    return own, ()


@contextmanager
def _offline(away: bool) -> Generator[None, None, None]:
    """Let `datasets` look into its cache alone."""
    if not away:
        yield
        return
    import datasets.config

    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        with cache_alone():
            yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """No words of the libraries about every try: what is wrong is said once, by us."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets", "fsspec")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)

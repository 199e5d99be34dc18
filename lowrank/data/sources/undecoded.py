"""Datasets of `datasets` whose pictures, sounds and videos come as the files they are.

Left alone they come decoded: pictures as Pillow's, which would have to be encoded anew (without EXIF, several times as
large), sounds and videos by packages that need not be installed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

_DECODED = ("Image", "Audio", "Video")
"""Names of the classes of features that decode files."""


def undecoded_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows, with `{bytes, path}` for each file in them; as they are, where the dataset has a transform of its own,
    which expects them decoded."""
    features: Any = dataset.features
    transformed = (getattr(dataset, "format", None) or {}).get("type") == "custom"
    own = {} if not features or transformed else {key: _as_files(feature) for key, feature in features.items()}
    own = {key: feature for key, feature in own.items() if feature is not features[key]}
    if not own:
        yield from dataset
        return
    if hasattr(dataset, "format"):  # cast_column copies whole tables for what lies in lists
        dataset = copy.deepcopy(dataset)
        for key, feature in own.items():
            dataset.info.features[key] = feature
    else:
        for key, feature in own.items():
            dataset = dataset.cast_column(key, feature)
    for row in dataset:
        yield {key: _fetched(value, features[key]) if key in own else value for key, value in row.items()}


def _as_files(feature: Any) -> Any:
    """The feature with nothing decoded; itself where nothing is."""
    if type(feature).__name__ in _DECODED and getattr(feature, "decode", False):
        feature = copy.copy(feature)
        feature.decode = False
        return feature
    if isinstance(feature, Mapping):
        inside = {key: _as_files(each) for key, each in feature.items()}
        return feature if all(inside[key] is feature[key] for key in inside) else inside
    if isinstance(feature, list):
        inside = [_as_files(each) for each in feature]
        return feature if all(map(_same, inside, feature)) else inside
    item = getattr(feature, "feature", None)
    if item is None or _as_files(item) is item:
        return feature
    feature = copy.copy(feature)
    feature.feature = _as_files(item)
    return feature


def _same(one: Any, other: Any) -> bool:
    return one is other


def _fetched(value: Any, feature: Any) -> Any:
    """A value whose file is elsewhere (a stream's `hf://...`), decoded by `datasets`, which reads it there."""
    if type(feature).__name__ in _DECODED:
        elsewhere = isinstance(value, dict) and value.get("bytes") is None and "://" in str(value.get("path"))
        return feature.decode_example(value) if elsewhere else value
    if isinstance(feature, Mapping) and isinstance(value, dict):
        return {key: _fetched(each, feature[key]) if key in feature else each for key, each in value.items()}
    item = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    return [_fetched(each, item) for each in value] if isinstance(value, list) else value

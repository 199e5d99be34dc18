"""Training's limits of pixels in the files of a model's processor: who serves it shows pictures as large as it learned
from, and no larger.

Only processors that limit the pixels of a picture (Qwen's) have such numbers; others make every picture one size, or
tiles of one. Which they are transformers' own class says, not a list.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank.foreign_files import find_json, write_json

_FILES = ("preprocessor_config.json", "processor_config.json")
_MAX, _MIN = "max_pixels", "min_pixels"


def write_pixel_limits(folder: Path, max_pixels: int, min_pixels: int) -> None:
    """Into the files of the processor in `folder`; stricter limits that stand there already stay."""
    for name in _FILES:
        settings = find_json(folder / name)
        if settings is None:
            continue
        own = settings.get("image_processor") if isinstance(settings.get("image_processor"), dict) else settings
        if own is not None and _limits_pixels(own):
            _limit(own, max_pixels, min_pixels)
            write_json(folder / name, settings)


def _limit(settings: dict[str, Any], max_pixels: int, min_pixels: int) -> None:
    size = settings.get("size")
    size = size if isinstance(size, dict) and "longest_edge" in size else None
    known = {_MAX: settings.get(_MAX), _MIN: settings.get(_MIN)}
    if size is not None:  # of these two the processor reads `size` where both stand there
        known = {_MAX: known[_MAX] or size["longest_edge"], _MIN: known[_MIN] or size.get("shortest_edge")}
    most = min(max_pixels, known[_MAX] or max_pixels)
    least = min(most, max(min_pixels, known[_MIN] or min_pixels))
    if size is not None:
        size |= {"longest_edge": most, "shortest_edge": least}
    if size is None or settings.get(_MAX) is not None:
        settings |= {_MAX: most, _MIN: least}


def _limits_pixels(settings: dict[str, Any]) -> bool:
    import transformers  # seconds of imports, for models that were shown pictures alone

    name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    kind = getattr(transformers, f"{name.removesuffix('Fast').removesuffix('Pil')}Pil", None)
    options = getattr(kind, "valid_kwargs", None)
    return {_MAX, _MIN} <= set(getattr(options, "__annotations__", ()))

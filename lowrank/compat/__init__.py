"""Files of other programs, read as they are. `load_any` decides whose a file is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank.compat.llamafactory import convert, is_llamafactory
from lowrank.compat.llamafactory_others import known
from lowrank.config import RunConfig, override, read_file, resolve, unused


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, list[str]]:
    """The configuration in a native or a LLaMA-Factory file, with overrides over it, and warnings.

    Over a LLaMA-Factory file, overrides may be its own keys (`lora_rank=16`) or native ones
    (`adapter.rank=16`). In place of a file, `path` may be a word like them: the settings are then the words alone.
    Raises `ConfigError`.
    """
    if "=" in str(path) and not Path(path).exists():
        config = resolve(override({}, [str(path), *overrides]), Path(), "the command line")
        return config, unused(config)
    path = Path(path)
    settings = read_file(path)
    if not is_llamafactory(settings):
        config = resolve(override(settings, overrides), path.parent, str(path))
        return config, unused(config)
    native = [word for word in overrides if _is_native(word)]
    theirs = [word for word in overrides if word not in native]
    converted = convert(override(settings, theirs), folder=path.parent)
    if any(word.startswith("overwrite=") for word in native):
        converted.config.pop("resume", None)  # set only because their file left the choice open
    config = resolve(override(converted.config, native), path.parent, f"{path}, converted,")
    return config, [*converted.warnings, *unused(config)]


def _is_native(word: str) -> bool:
    key = word.partition("=")[0]
    return key not in known() and key.split(".")[0] in RunConfig.model_fields

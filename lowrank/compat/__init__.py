"""Files of other programs, read as they are. `load_any` decides whose a file is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.compat.llamafactory.convert import convert, is_llamafactory
from lowrank.compat.llamafactory.flags import MARK
from lowrank.compat.llamafactory.other_keys import known
from lowrank.compat.llamafactory.v1 import as_v0, is_v1
from lowrank.config import RunConfig, override, read_file, unused, validate_settings
from lowrank.errors import ConfigError
from lowrank.third_party import code_allowed


def load_any(
    path: str | Path, overrides: Sequence[str] = (), *, allow_code: bool = False
) -> tuple[RunConfig, list[str]]:
    """The configuration in a native or a LLaMA-Factory file, with overrides over it, and warnings.

    Over a LLaMA-Factory file, overrides may be its own keys (`lora_rank=16`) or native ones
    (`adapter.rank=16`). In place of a file, `path` may be a word like them: the settings are then the words alone.
    `allow_code`: code that the settings name may run. Raises `ConfigError`.
    """
    with code_allowed(allow_code):
        return _load_any(path, overrides)


def _load_any(path: str | Path, overrides: Sequence[str]) -> tuple[RunConfig, list[str]]:
    if "=" in str(path) and not Path(path).exists():
        arguments = [str(path), *overrides]
        if any(argument.startswith(f"{MARK}=") for argument in arguments):
            return _load_llamafactory({}, arguments, Path(), "the command line")
        config = validate_settings(override({}, arguments), Path(), "the command line")
        return config, unused(config)
    path = Path(path)
    settings = read_file(path)
    _refuse_others(path, settings)
    if is_v1(settings) or is_llamafactory(settings):
        return _load_llamafactory(settings, overrides, path.parent, str(path))
    config = validate_settings(override(settings, overrides), path.parent, str(path), overrides)
    return config, unused(config)


def _load_llamafactory(
    settings: Mapping[str, Any], overrides: Sequence[str], folder: Path, source: str
) -> tuple[RunConfig, list[str]]:
    """With overrides that are its own keys, and native ones over what comes of it."""
    datasets, notes = None, []
    if is_v1(settings):
        v0 = as_v0(settings, folder)
        settings, datasets, notes = v0.settings, (v0.train, v0.eval), v0.warnings
    native = [argument for argument in overrides if _is_native(argument)]
    theirs = [argument for argument in overrides if argument not in native]
    converted = convert(override(settings, theirs), folder=folder, datasets=datasets, source=source, overrides=theirs)
    if any(argument.startswith("overwrite=") for argument in native):
        converted.config.pop("resume", None)  # set only because their file left the choice open
    config = validate_settings(override(converted.config, native), folder, f"{source}, converted,", overrides)
    return config, [*notes, *converted.warnings, *unused(config)]


def _refuse_others(path: Path, settings: Mapping[str, Any]) -> None:
    """ConfigError for the settings of programs that are known and not read."""
    for name, marks in _OTHERS.items():
        if any(mark <= settings.keys() for mark in marks):
            raise ConfigError(
                f"{path} is {name}, which lowrank does not read; it needs model, data and output_dir (docs/settings.md)"
            )


_OTHERS = {
    "a configuration of accelerate": [
        {"compute_environment", "distributed_type"},
        {"distributed_type", "num_processes"},
    ],
    "a configuration of DeepSpeed": [{"zero_optimization"}, {"train_micro_batch_size_per_gpu"}],
    "a file of axolotl": [{"base_model", "datasets"}],
}
"""By keys that stand side by side in no file of ours or of LLaMA-Factory's."""


def _is_native(argument: str) -> bool:
    key = argument.partition("=")[0]
    return key not in known() and key.split(".")[0] in RunConfig.model_fields

"""The words of `lowrank export` as settings of its targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from lowrank.errors import ConfigError, did_you_mean, raise_all
from lowrank.export import targets
from lowrank.export.merge.combine import CombineConfig
from lowrank.export.targets import TargetConfig
from lowrank.setting_problems import error_lines
from lowrank.settings import Settings, configs_in


def read_targets(names: str, options: Sequence[str], short: Mapping[str, str | None]) -> list[TargetConfig]:
    """The targets of `peft,merged` with `KEY=VALUE` options (`merged.dtype=float16`; with one target `dtype=float16`).

    `short`: options that go to every target that has such a setting. ConfigError lists all that is wrong.
    """
    known = configs_in(targets.__name__)
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    problems = [f"--to {name}: there is no such target{did_you_mean(name, known)}" for name in chosen
                if name not in known and ":" not in name]  # fmt: skip
    problems += [f"--to {name}: named twice" for name in sorted({name for name in chosen if chosen.count(name) > 1})]
    settings: dict[str, dict[str, Any]] = {name: {"type": name} for name in chosen}
    for option in options:
        problems += _take(option, settings, known)
    for key, value in short.items():
        takers = [name for name in chosen if name in known and key in known[name].model_fields]
        if value is not None and not takers:
            problems.append(f"--{key.removesuffix('s')} {value}: {', '.join(chosen)} has no such setting")
        for name in takers if value is not None else ():
            settings[name].setdefault(key, _value(str(value), known[name], key))
    raise_all(ConfigError, "the command line", problems)
    found = []
    for name, own in settings.items():
        try:
            found.append(TypeAdapter(TargetConfig).validate_python(own))
        except ValidationError as error:
            problems += [f"{name}.{line}" for line in error_lines(error, own, TargetConfig)]
    raise_all(ConfigError, "the settings of the export", problems)
    return found


def read_combination(method: str | None, weights: str | None, density: float) -> CombineConfig | None:
    """None if nothing is said about combining."""
    if method is None and weights is None:
        return None
    try:
        numbers = tuple(float(number) for number in weights.split(",")) if weights else ()
    except ValueError as error:
        raise ConfigError(f"--weights {weights}: expected numbers with commas between them, like 0.7,0.3") from error
    given = {"method": method or "add", "weights": numbers, "density": density}
    try:
        return CombineConfig.model_validate(given)
    except ValidationError as error:
        lines = error_lines(error, given, CombineConfig)
        raise ConfigError("\n".join(f"--{line.replace('method', 'combine', 1)}" for line in lines)) from error


def _take(option: str, settings: dict[str, dict[str, Any]], known: Mapping[str, type[Settings]]) -> list[str]:
    """Put one `KEY=VALUE` into the settings of its target; what is wrong with it."""
    key, sign, value = option.partition("=")
    first, _, rest = key.partition(".")
    if not sign:
        return [f"{option!r}: expected KEY=VALUE"]
    if rest and first in settings:
        settings[first][rest] = _value(value, known.get(first), rest)
        return []
    if len(settings) == 1:
        name = next(iter(settings))
        settings[name][key] = _value(value, known.get(name), key)
        return []
    return [f"{option}: with several targets say whose: {next(iter(settings), 'merged')}.{key}=..."]


def _value(text: str, config: type[Settings] | None, key: str) -> Any:
    """Read as YAML; where a list is expected, commas separate its items."""
    field = config.model_fields.get(key) if config else None
    if field is not None and (field.annotation is str or get_origin(field.annotation) is tuple):
        listed = get_origin(field.annotation) is tuple and not text.startswith("[")
        return [item.strip() for item in text.split(",")] if listed else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text}: cannot be read as YAML") from error

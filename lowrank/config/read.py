"""From a file and `key=value` words to a `RunConfig`.

    file (YAML or JSON) -> dict -> overrides -> paths -> RunConfig

YAML is read by its 1.2 rules for plain values: `1e-4` is a number, `no` is a text, `1:30` is a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lowrank.config.code import refuse_code
from lowrank.config.jobs import SHORT_FORMS, spell_out
from lowrank.config.paths import locate_paths
from lowrank.config.problems import error_lines
from lowrank.config.schema import RunConfig
from lowrank.dotted_keys import split_override
from lowrank.errors import ConfigError, did_you_mean, raise_all
from lowrank.foreign_files import DEEPEST_JSON, is_deeper, read_at_most
from lowrank.foreign_yaml import load_yaml
from lowrank.setting_problems import dotted
from lowrank.third_party import code_allowed, may_run, names_code

_SHOWN_OVERRIDES, _SHOWN_LETTERS = 3, 60


def load(path: str | Path, overrides: Sequence[str] = (), *, allow_code: bool = False) -> RunConfig:
    """The configuration in a native YAML or JSON file, with `optimizer.learning_rate=1e-4` words over it.

    Raises `ConfigError` with every problem there is, each with its place; code that is not ours and that the settings
    name is one, unless `allow_code`.
    """
    path = Path(path)
    content = override(read_file(path), overrides)
    return validate_settings(content, path.parent, str(path), overrides, allow_code=allow_code)


def named_source(source: str, overrides: Sequence[str], problems: Sequence[str]) -> str:
    """What error messages call the settings of `source` with `key=value` words over them: with those of the words that
    `problems` are about."""
    places = [problem.partition(":")[0] for problem in problems]
    at_fault = [entry for entry in overrides if any(map(partial(_is_about, entry.partition("=")[0]), places))]
    shown = [
        entry if len(entry) <= _SHOWN_LETTERS else f"{entry[:_SHOWN_LETTERS]}..."
        for entry in at_fault[:_SHOWN_OVERRIDES]
    ]
    more = len(at_fault) - len(shown)
    return f"{source} with {' '.join(shown)}{f' and {more} more' if more else ''} over it" if shown else source


def _is_about(key: str, place: str) -> bool:
    return place == key or place.startswith(f"{key}.") or key.startswith(f"{place}.") or place.endswith(f".{key}")


def validate_settings(
    settings: Mapping[str, Any],
    folder: Path | None = None,
    source: str = "the settings",
    overrides: Sequence[str] = (),
    *,
    allow_code: bool = False,
) -> RunConfig:
    """A `RunConfig` of plain settings, as a native file has them.

    With a `folder`, paths that do not exist as they stand are looked for there too. `source` is what
    error messages call the settings, `overrides` the `key=value` words that are in them already.
    `allow_code`: code that the settings name may run.
    """
    with code_allowed(allow_code):
        config = _validated(settings, folder, source, overrides)
        refuse_code(config, source)
        return config


def settings_of_run(file: Path) -> RunConfig:
    """The settings in a run folder's config.json, for using what was trained, not for training.

    What only training needs (optimizer, schedule, reporters) is left out, and so is an objective that names code,
    unless code may run; reward functions and formats stay names. ConfigError as from `validate_settings`.
    """
    settings = _for_use(spell_out(read_file(file)))
    jobs = settings.get("jobs")
    if isinstance(jobs, list):
        settings["jobs"] = [_for_use(job) if isinstance(job, Mapping) else job for job in jobs]
    return _validated(settings, None, str(file))


_OF_TRAINING = ("optimizer", "schedule", "report_to")


def _for_use(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in _OF_TRAINING}
    objective = kept.get("objective")
    if isinstance(objective, Mapping) and names_code(kind := objective.get("type")) and not may_run(str(kind)):
        del kept["objective"]
    return kept


def _validated(
    settings: Mapping[str, Any], folder: Path | None, source: str, overrides: Sequence[str] = ()
) -> RunConfig:
    if is_deeper(settings, DEEPEST_JSON):
        raise ConfigError(f"{source}: nested more than {DEEPEST_JSON} deep, which no settings are")
    settings, problems = spell_out(settings), []
    if folder is not None:
        settings, problems = locate_paths(settings, folder)
    problems += [
        f"{dotted(place)}: a zero byte, which no text, name or path may have" for place in _zero_bytes(settings)
    ]
    config = None
    try:
        config = RunConfig.model_validate(settings)
    except ValidationError as error:
        problems += error_lines(error, settings, RunConfig)
    raise_all(ConfigError, f"{named_source(source, overrides, problems)} cannot be used:", problems)
    assert config is not None
    return config


def _zero_bytes(settings: Any) -> Iterator[tuple[Any, ...]]:
    """The places of texts that hold one."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), settings)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, str) and "\0" in value:
            yield place
        elif isinstance(value, Mapping):
            waiting += [((*place, key), each) for key, each in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [((*place, number), each) for number, each in enumerate(value)]


def read_file(path: Path) -> dict[str, Any]:
    """The top-level mapping of a YAML or JSON file. Raises `ConfigError`, with line and column if it is malformed."""
    raw = read_at_most(path, _LARGEST + 1, ConfigError)
    if len(raw) > _LARGEST:
        raise ConfigError(f"{path} has more than {_LARGEST:,} bytes; settings are a few hundred: is it a data file?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        content = _parse_json(path, text) if path.suffix == ".json" else _parse_yaml(path, text)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply to be settings") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{path}: expected settings (key: value), found {found}")
    return content


def override(settings: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The settings with `a.b=value` words over them; values are read as YAML. The given settings are left alone.

    Entries of lists are named by place, those of `jobs` also by name: `jobs.r8.adapter.rank=8`. A key with dots of its
    own stands in quotes: `adapter.rank_pattern."layers.0.self_attn.q_proj"=4`.
    """
    result: Any = spell_out(settings) if overrides else dict(settings)
    problems: list[str] = []
    for entry in overrides:
        keys, text = split_override(entry)
        if text is None or keys == [""]:
            problems.append(f"{entry!r}: expected key=value, for example optimizer.learning_rate=1e-4")
            continue
        try:
            result = _with(result, keys, parse_value(text), ())
        except ConfigError as error:
            problems.append(f"{entry}: {error}")
    raise_all(ConfigError, "The command line cannot be used:", problems)
    return result


def parse_value(text: str) -> Any:
    """What a YAML file would make of `text`; plain text with a colon in it stays text."""
    try:
        value = load_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{text!r} cannot be read as a value; put it in quotes") from error
    return text if isinstance(value, dict) and not text.lstrip().startswith("{") else value


def _with(settings: Any, keys: Sequence[str], value: Any, above: tuple[str, ...]) -> Any:
    if not keys:
        return value
    key, *rest = keys
    here = ".".join(above)
    if isinstance(settings, (list, tuple)):
        place = _place_in_list(settings, key, here)
        return [_with(item, rest, value, (*above, key)) if n == place else item for n, item in enumerate(settings)]
    if settings is None:
        settings = {}
    if isinstance(settings, str) and len(above) == 1 and above[0] in SHORT_FORMS:
        settings = {SHORT_FORMS[above[0]]: settings}
    if not isinstance(settings, dict):
        raise ConfigError(f"{here} is {settings!r}, not a group of settings")
    if key == "jobs" and not above and rest and not settings.get("jobs"):
        raise ConfigError("there is no list of jobs; leave out 'jobs' to change the one job")
    return {**settings, key: _with(settings.get(key), rest, value, (*above, key))}


def _place_in_list(items: Sequence[Any], key: str, here: str) -> int:
    names = {str(item["name"]): n for n, item in enumerate(items) if isinstance(item, dict) and "name" in item}
    if key in names:
        return names[key]
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    hint = did_you_mean(key, names) if names else ""
    raise ConfigError(f"{here} has {len(items)} entries, none of them is {key!r}{hint}")


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_int=_whole)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ConfigError(f"the key {key!r} is given twice in one group")
        content[key] = value
    return content


def _parse_yaml(path: Path, text: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from error


_LARGEST = 10_000_000


def _whole(digits: str) -> int:
    if len(digits) > 100:
        raise ConfigError(f"a number of {len(digits)} digits is none that a setting can have")
    return int(digits)

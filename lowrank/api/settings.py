"""Settings as a Python caller writes them, with rows, functions and classes in them, as the plain ones of a file.

data=[{...}, ...]              -> data: {train: [{path: "memory:3f9c..."}]}
reward_funcs=[my_reward]       -> reward_funcs: ["my_module:my_reward"], which means that object in this call
objective=MyObjective          -> objective: {type: "my_module:MyObjective"}, the same
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from pydantic import create_model

from lowrank.api.peft_config import from_lora_config
from lowrank.config.jobs import SHORT_FORMS, TYPED
from lowrank.config.own_types import PAGES
from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.sources.memory import RowsLike, keep_rows
from lowrank.errors import ConfigError, DataError
from lowrank.objectives import ObjectiveSettings
from lowrank.objectives.protocol_problems import PROTOCOL
from lowrank.setting_problems import settings_of
from lowrank.settings import Settings, configs_in
from lowrank.third_party import names_code


@dataclass
class PlainSettings:
    """What a file could have said, and what no file can hold: the objects meant by names in it."""

    values: dict[str, Any] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)


def plain_settings(settings: Mapping[str, Any]) -> PlainSettings:
    """`settings` without objects. Raises DataError for rows that are none, ConfigError for an object that is none of
    the kind its place asks for."""
    found = PlainSettings()
    found.values = _group(settings, found.objects)
    return found


def _group(settings: Mapping[str, Any], objects: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "jobs" and isinstance(value, Sequence) and not isinstance(value, str):
            values[key] = [_group(job, objects) if isinstance(job, Mapping) else job for job in value]
        elif key == "data":
            values[key] = _data(value, objects)
        elif key in TYPED:
            values[key] = _typed(key, value, objects)
        else:
            values[key] = _named(value, objects)
    return values


def _data(value: Any, objects: dict[str, Any]) -> Any:
    if isinstance(value, Mapping):
        given = {key: _named(each, objects) for key, each in value.items() if key not in ("train", "eval")}
        return given | {key: _sources(value[key], objects) for key in ("train", "eval") if key in value}
    if isinstance(value, DataConfig):
        name_functions(value, objects)
    is_group = isinstance(value, Settings) and not isinstance(value, SourceConfig)
    return value if is_group else {SHORT_FORMS["data"]: _sources(value, objects)}


def name_functions(data: DataConfig, objects: dict[str, Any]) -> None:
    """Add the functions that its datasets were given as `format` (`lowrank.rows`) to `objects`, by the names that the
    settings have for them. ConfigError where one name means two of them."""
    for source in (*data.train, *data.eval):
        if _with_free_name(source, objects) is not source:
            raise ConfigError(f"data: two functions for format are called {source.format}; name each its own")


def _with_free_name(source: SourceConfig, objects: dict[str, Any]) -> SourceConfig:
    """The dataset, whose function, if it was given one, is in `objects` by the name that stands in `format`."""
    function = source._format_function  # pyright: ignore[reportPrivateUsage] (as `_held`)
    if function is None:
        return source
    name = name_of(function, objects)
    objects[name] = function
    return source if name == source.format else source.model_copy(update={"format": name})


def _sources(value: Any, objects: dict[str, Any]) -> Any:
    """Rows, a path, a source, or several of these."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (SourceConfig, Mapping)):
        return [_one_source(value, objects)]
    if isinstance(value, (list, tuple)) and (not value or not _is_row(value[0])):
        return [_one_source(each, objects) for each in value]
    return [rows(value)]


def _one_source(value: Any, objects: dict[str, Any]) -> Any:
    """A path, a source, or rows, as one of several datasets."""
    if isinstance(value, SourceConfig):
        return _with_free_name(value, objects)
    if isinstance(value, str):
        return value
    return _source(value, objects) if isinstance(value, Mapping) else rows(value)


def sources_of(data: Any, objects: dict[str, Any]) -> list[SourceConfig]:
    """One value of `data` as sources: a path, rows, a source, or several. ConfigError for what is none."""
    found = {"train": _sources(data, objects)}
    return list(settings_of(DataConfig, found, "data cannot be used:").train)


def one_source(data: Any, what: str, objects: dict[str, Any] | None = None) -> SourceConfig:
    """`sources_of` where there is one; DataError for several. `what`: for whom."""
    found = sources_of(data, {} if objects is None else objects)
    if len(found) != 1:
        raise DataError(f"{what}: give one dataset")
    return found[0]


def _source(value: Mapping[str, Any], objects: dict[str, Any]) -> Any:
    """`{"path": ...}`, or `{"rows": ..., "format": ...}`: what a source has, with rows in the place of a path."""
    named = {key: _named(each, objects) for key, each in value.items() if key != "rows"}
    return rows(value["rows"], **named) if "rows" in value else named


def rows(rows: RowsLike, **settings: Any) -> SourceConfig:
    """Rows as a dataset of the settings; `settings` are the source's others (`format`, `columns`, `max_samples` ...).
    `format` may be a function, which the call that is given the dataset then knows.

    A generator is read to its end, once. DataError if `rows` are not rows, or there are none; ConfigError for settings
    that a source does not have.
    """
    if "path" in settings:
        raise ConfigError(f"rows: they are here, so they have no path (got {settings['path']!r}); give one of both")
    objects: dict[str, Any] = {}
    named = {"path": "", **{key: _named(each, objects) for key, each in settings.items()}}
    checked = settings_of(SourceConfig, named, "the settings of the rows cannot be used:")
    source = keep_rows(rows, checked)
    source._format_function = objects.get(str(source.format))  # pyright: ignore[reportPrivateUsage] (as `_held`)
    return source


def _is_row(value: Any) -> bool:
    """A dict that is no source: a source says where its rows are, and nothing that sources do not have."""
    if not isinstance(value, Mapping):
        return False
    return value.keys().isdisjoint(("path", "rows")) or not value.keys() <= {*SourceConfig.model_fields, "rows"}


def _typed(group: str, value: Any, objects: dict[str, Any]) -> Any:
    """A group of settings that is told apart by `type`, whose type may be an object."""
    if isinstance(value, Settings):
        kind = str(getattr(value, "type", ""))
        if names_code(kind):
            objects[kind] = SimpleNamespace(Config=type(value))
        return value
    if isinstance(value, Mapping):
        return {
            key: _type_of(group, each, objects) if key == "type" else _named(each, objects)
            for key, each in value.items()
        }
    return value if value is None or isinstance(value, str) else {"type": _type_of(group, value, objects)}


def _type_of(group: str, value: Any, objects: dict[str, Any]) -> Any:
    """The name by which an object is the `type` of its group: a class with settings of its own (`Config`), the class of
    such settings, or an objective itself."""
    if value is None or isinstance(value, str):
        return value
    config = settings_class(value)
    if isinstance(value, type) and config is not None:
        name = str(config.model_fields["type"].default) if "type" in config.model_fields else ""
        if configs_in(TYPED[group][0]).get(name) is config:
            return name
        if not names_code(name):
            named = value.__name__ if value is config else f"{value.__name__}.Config"
            raise ConfigError(f"{group}: {named} needs a field `type: Literal['my_module:MyThing']`")
        objects[name] = SimpleNamespace(Config=config) if value is config else value
        return name
    if group != "objective" or not any(hasattr(value, member) for member in PROTOCOL):
        if group == "adapter" and (same := from_lora_config(value)) is not None:
            raise ConfigError(f"{group}: {_kind_of(value)} cannot be used; {same}")
        itself = " an object with `record`, `count` and `loss`," if group == "objective" else ""
        raise ConfigError(
            f"{group}: {_kind_of(value)} cannot be used; give{itself} a class with the attribute `Config`, its "
            f"settings (the class or an object of it), or a name: {PAGES[group]}"
        )
    name = name_of(value, objects)
    objects[name] = with_settings(name, value)
    return name


def _kind_of(value: Any) -> str:
    """What an object is, instead of all that is in it: `peft's LoraConfig`."""
    kind = value if isinstance(value, type) else type(value)
    package = kind.__module__.partition(".")[0]
    return repr(value)[:100] if package == "builtins" else f"{package}'s {kind.__qualname__}"


def settings_class(thing: Any) -> type[Settings] | None:
    """That of settings, of their class, or of a class that carries it as `Config`; None for anything else."""
    config = type(thing) if isinstance(thing, Settings) else thing
    if not (isinstance(config, type) and issubclass(config, Settings)):
        config = getattr(thing, "Config", None)
    return config if isinstance(config, type) and issubclass(config, Settings) else None


def with_settings(name: str, objective: Any) -> Any:
    """An objective that is there already (or its class) as the type `name`, with settings that hold nothing."""
    kind: Any = (Literal[name], name)  # type: ignore[valid-type]  # made here, for pydantic
    plain = create_model("GivenObjective", __base__=ObjectiveSettings, type=kind)

    class GivenObjective(plain):  # type: ignore[misc, valid-type]  # a class made above
        def build(self) -> Any:
            return objective() if isinstance(objective, type) else objective

    return SimpleNamespace(Config=GivenObjective)


def _named(value: Any, objects: dict[str, Any]) -> Any:
    """The same with names in the place of functions and classes."""
    if isinstance(value, Mapping):
        return {key: _named(each, objects) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_named(each, objects) for each in value]
    if isinstance(value, Settings) or not callable(value):
        return value
    name = name_of(value, objects)
    objects[name] = value
    return name


def name_of(thing: Any, objects: Mapping[str, Any]) -> str:
    """`my_module:my_function`, unlike those that are taken; of what has no name (a lambda), something like it."""
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    module = ".".join(part if part.isidentifier() else "_" for part in str(kind.__module__).split("."))
    own = re.sub(r"\W", "_", str(kind.__qualname__).replace("<locals>.", "").replace("<lambda>", "anonymous"))
    name, number = f"{module}:{own}", 1
    while name in objects and objects[name] is not thing:
        number += 1
        name = f"{module}:{own}_{number}"
    return name

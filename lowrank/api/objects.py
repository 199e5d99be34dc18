"""Objects that a run was given in Python, given to it again in a later process, where its settings only name them.

settings say objective: {type: "__main__:Focal"}      objects=[Focal()]      -> that name means this object
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from lowrank.api.settings import name_of, rows, settings_class, with_settings
from lowrank.data.config import SourceConfig
from lowrank.data.sources.memory import IN_MEMORY
from lowrank.errors import ConfigError, DataError, did_you_mean, raise_all
from lowrank.settings import Settings
from lowrank.third_party import ALLOW_CODE_HINT, PASS_OBJECTS_HINT, code_named, may_run, texts_in


@dataclass
class GivenAgain:
    """`objects` by the names that the settings have for them; `rows` live as long as somebody holds this."""

    objects: dict[str, Any] = field(default_factory=dict)
    rows: list[SourceConfig] = field(default_factory=list)


def given_again(objects: Sequence[Any], settings: Mapping[str, Any]) -> GivenAgain:
    """`objects` under the names in `settings`. ConfigError lists those that no name there can mean."""
    found = GivenAgain()
    named = dict.fromkeys(name for _, name in code_named(settings))
    paths = {text for _, text in texts_in(settings) if text.startswith(IN_MEMORY)}
    originals: dict[str, Any] = {}
    problems: list[str] = []
    for each in objects:
        own = _own_name(each, originals) if _is_named(each) else None
        name = None if own is None else _name_in(own, named)
        source = _rows_of(each, own) if own is None or (name is None and paths and _returns_rows(each)) else None
        if source is not None:
            found.rows.append(source)
            if source.path not in paths:
                problems.append("these rows are not those that the run was given: their content differs")
            continue
        assert own is not None, "what has no name holds rows"
        originals[own] = each
        if name is None:
            known = did_you_mean(own, named) if named else "; its settings name no code"
            problems.append(f"{own} is none of the objects that the run was given{known}")
        else:
            found.objects[name] = _as_type(name, each)
    raise_all(ConfigError, "resume: objects that cannot be used:", problems)
    return found


def refuse_missing(settings: Mapping[str, Any], run: str) -> None:
    """ConfigError for code that `settings` name and that neither was given nor may be imported: a line for each name,
    with all places that have it."""
    places: dict[str, list[str]] = {}
    for place, name in code_named(_as_trained(settings)):
        if not may_run(name):
            places.setdefault(name, []).append(place)
    problems = [f"{', '.join(where)}: {_described(name)}" for name, where in places.items()]
    heading = f"{run} was trained with code that does not come with lowrank; {PASS_OBJECTS_HINT}. "
    raise_all(ConfigError, f"{heading}What can be imported: {ALLOW_CODE_HINT}", problems)


def _as_trained(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` without what stands at the top for jobs, each of which has it too; of one job without its number."""
    jobs = [job for job in settings.get("jobs") or () if isinstance(job, Mapping)]
    in_jobs = {key for job in jobs for key in job} | {"jobs"}
    top = {key: value for key, value in settings.items() if key not in in_jobs}
    return {**top, **jobs[0]} if len(jobs) == 1 else {**top, "jobs": jobs}


def _described(name: str) -> str:
    """The name, and of a lambda (`name_of`) what tells it from others."""
    if re.search(r"(^|_)anonymous(_\d+)?$", name.partition(":")[2]):
        return f"{name!r}, a lambda; several are told apart by their order in objects=[...]"
    return repr(name)


def _is_named(thing: Any) -> bool:
    """An objective, a function, a class or its settings; everything else holds rows."""
    if isinstance(thing, SourceConfig) or hasattr(thing, "iterrows") or hasattr(thing, "column_names"):
        return False  # rows, whatever their columns are called
    return isinstance(thing, (type, Settings)) or callable(thing) or hasattr(thing, "loss")


def _rows_of(thing: Any, own: str | None) -> SourceConfig | None:
    """None for a function of the name `own` that gives no rows. DataError for rows that are none."""
    if isinstance(thing, SourceConfig):
        return thing
    try:
        return rows(thing)
    except DataError:
        if own is None:
            raise
        return None


def _returns_rows(thing: Any) -> bool:
    """A function that can be called without arguments, as rows may be given."""
    if isinstance(thing, (type, Settings)) or hasattr(thing, "loss"):
        return False
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):  # of what is built in
        return False
    return all(each.kind is each.VAR_POSITIONAL or each.default is not each.empty for each in parameters)


def _own_name(thing: Any, taken: Mapping[str, Any]) -> str:
    config = settings_class(thing)
    if isinstance(thing, (type, Settings)) and config is not None:
        kind = config.model_fields.get("type")
        if kind is not None:
            return str(kind.default)
    return name_of(thing, taken)


def _name_in(own: str, named: Mapping[str, None]) -> str | None:
    """The name in the settings: the same, or, of a script that became a module, the one with the same end."""
    if own in named:
        return own
    same_end = [name for name in named if name.partition(":")[2] == own.partition(":")[2]]
    return same_end[0] if len(same_end) == 1 else None


def _as_type(name: str, thing: Any) -> Any:
    """What `name` means where settings are read (lowrank/settings.py)."""
    config = settings_class(thing)
    if config is not None and (isinstance(thing, Settings) or thing is config):
        return SimpleNamespace(Config=config)
    if getattr(thing, "Config", None) is not None and isinstance(thing, type):
        return thing
    return with_settings(name, thing) if hasattr(thing, "loss") else thing

"""What is wrong with the settings of a run or a job, in plain words and with the place as the user wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from lowrank.config.jobs import TYPED
from lowrank.config.refused_parallelism import why_refused
from lowrank.config.sweeps import swept_path
from lowrank.errors import did_you_mean
from lowrank.peer_names import called_here, root_of
from lowrank.renamed import new_name
from lowrank.setting_problems import Path, complaint, dotted, existing, groups_in, known_keys

SETTINGS_PAGE = "docs/settings.md"
_DEFAULT_TYPES = tuple(default for _, default in TYPED.values())


class SettingsConflict(ValueError):
    """Settings that are right one by one but not together. `problems` has one line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def error_lines(error: ValidationError, settings: Mapping[str, Any], kind: type[BaseModel]) -> list[str]:
    """One line per problem: `jobs.1.adapter.rnk: unknown key; did you mean 'rank'?`.

    `settings` are what was validated, spelled out, with `jobs` as the user wrote them; `kind` is `RunConfig`, or
    `JobConfig` for a job alone.
    """
    conflicts: list[str] = []
    by_path: dict[Path, list[Any]] = {}
    for entry in error.errors():
        cause = entry.get("ctx", {}).get("error")
        if isinstance(cause, SettingsConflict):
            conflicts.extend(cause.problems)
        else:
            # a mistake at the top level is found again in every job: one line for it
            swept = swept_path(entry["loc"], settings)
            by_path.setdefault(swept or _as_written(entry["loc"], entry["type"], settings), []).append(entry)
    return [_line(path, entries, settings, kind) for path, entries in by_path.items()] + conflicts


def _line(path: Path, entries: Sequence[Any], settings: Mapping[str, Any], kind: type[BaseModel]) -> str:
    first = entries[0]
    place = dotted(path) or ("the file" if _is_run(kind) else "the settings")
    if _is_run(kind) and len(path) == 1 and first["type"] in ("extra_forbidden", "literal_error"):
        reason = why_refused(str(path[0]), first["input"])
        if reason is not None:
            return f"{place}: {reason}"
    if first["type"] == "extra_forbidden":
        if path[:1] == ("sweep",) and len(path) == 3:
            key = str(path[2])
            here = called_here(key.rpartition(".")[2]) if _is_of_jobs(key, kind) else None
            return f"{place}: jobs have no such setting{here or did_you_mean(key, _dotted_names(kind), SETTINGS_PAGE)}"
        return f"{place}: unknown key{_suggestion(path, settings, kind)}"
    return f"{place}: {complaint(entries)}{_help(path, kind) if first['type'] == 'missing' else ''}"


def _is_run(kind: type[BaseModel]) -> bool:
    return "jobs" in kind.model_fields


def _of_a_job(kind: type[BaseModel]) -> type[BaseModel]:
    return groups_in(kind.model_fields["jobs"].annotation)[0] if _is_run(kind) else kind


def _as_written(loc: Path, kind: str, settings: Mapping[str, Any]) -> Path:
    """Where the user wrote it: without pydantic's names of alternatives, and at the top where the entry of `jobs`
    got it from there."""
    if len(loc) < 2 or loc[0] != "jobs" or not isinstance(settings.get("jobs"), list):
        rest = loc[2:] if loc[:1] == ("jobs",) and len(loc) > 2 else loc
        return existing(rest, kind, settings)
    if not settings["jobs"]:  # no entries: the one job is the top level
        return existing(loc[2:], kind, settings)
    entry = settings["jobs"][loc[1]]
    inside = existing(loc[2:], kind, entry)
    at_top = existing(loc[2:], kind, settings)
    if isinstance(entry, Mapping) and len(inside) < len(at_top) and loc[2:3] != ("name",):
        return at_top
    return ("jobs", loc[1], *inside)


def _suggestion(path: Path, settings: Mapping[str, Any], kind: type[BaseModel]) -> str:
    *parents, key = path
    now = new_name(path)
    if now is not None:
        return f"; it is called {now!r} now"
    here = _called_here(path, kind)
    if here is not None:
        return here
    known = known_keys(tuple(parents), settings, kind, _DEFAULT_TYPES)
    if parents[:1] == ["jobs"] and len(parents) == 2 and key in kind.model_fields:
        return "; it belongs to the whole run: put it at the top level"
    if parents and key in kind.model_fields:
        return "; it belongs at the top level"
    elsewhere = [dotted(place) for place in _places_of(str(key), kind) if place != path]
    if len(elsewhere) == 1 or (elsewhere and not parents):
        return f"; did you mean {' or '.join(map(repr, elsewhere))}?"
    return did_you_mean(str(key), known, SETTINGS_PAGE)


def _called_here(path: Path, kind: type[BaseModel]) -> str | None:
    """What a name of peers is called; None where the settings of `kind` have no place for it."""
    key = str(path[-1])
    if root_of(key) is None:
        return None
    if _is_of_jobs(key, kind):
        return called_here(key)
    if _is_run(kind):
        return called_here(key, ", at the top level" if path[:1] == ("jobs",) else "")
    return called_here(key, ", of the whole run")


def _is_of_jobs(key: str, kind: type[BaseModel]) -> bool:
    return root_of(key) in _of_a_job(kind).model_fields


def _dotted_names(kind: type[BaseModel]) -> list[str]:
    """Every setting of a job, with its groups."""
    return sorted({".".join(map(str, place)) for place in _below(_of_a_job(kind)) if place != ("name",)})


def _below(group: type[BaseModel], above: Path = ()) -> list[Path]:
    places: list[Path] = []
    for name, field in group.model_fields.items():
        inner = groups_in(field.annotation)
        places += [(*above, name), *(place for each in inner for place in _below(each, (*above, name)))]
    return places


def _places_of(key: str, group: type[BaseModel], above: Path = ()) -> list[Path]:
    """Every place of a setting named `key` in the groups below `group`; entries of `jobs` are left out."""
    places: list[Path] = []
    for name, field in group.model_fields.items():
        for inner in groups_in(field.annotation):
            if name == "jobs" or get_origin(field.annotation) is tuple:
                continue
            if key in inner.model_fields and (*above, name, key) not in places:
                places.append((*above, name, key))
            places.extend(place for place in _places_of(key, inner, (*above, name)) if place not in places)
    return places


def _help(path: Path, kind: type[BaseModel]) -> str:
    if path[:1] == ("jobs",) and path[-1:] == ("name",) and len(path) == 3:
        return "; every entry of jobs needs one"
    of_its_own = kind.model_fields.keys() - (_of_a_job(kind).model_fields.keys() if _is_run(kind) else ())
    if len(path) != 1 or path[0] not in of_its_own:
        return ""
    text = kind.model_fields[path[0]].description or ""
    return f" ({text.split('. ')[0].rstrip('.')})"

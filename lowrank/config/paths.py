"""Relative paths in a file: looked for from the current directory first, then beside the file.

People run `lowrank train examples/first.yaml` from the project's folder and keep data beside the file
or beside themselves; both work, and where both exist the current directory wins, as it does for a
path typed on the command line. Names without a path's look (`org/dataset`) may also be hub names, so
they are left as they are where no file matches.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from glob import iglob
from itertools import islice
from pathlib import Path
from typing import Any

from lowrank.data.sources.places import STANDARD_INPUT, is_pattern, path_problem, shown
from lowrank.errors import did_you_mean

FILE_SUFFIXES = (
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".txt",
    ".jinja",
    ".gz",
    ".zst",
    ".bz2",
    ".xz",
    ".zip",
    ".ndjson",
)
"""A name that ends like this is a file, never a hub name."""
_MOST_NAMES = 10_000


def locate_paths(settings: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings with `model.path`, data paths, folders of media, adapter paths and template files located, and what
    was not found.

    `settings` are spelled out (see `lowrank.config.jobs`).
    """
    problems: list[str] = []
    located = dict(settings)
    model = located.get("model")
    if isinstance(model, Mapping):
        located["model"] = _located_keys(model, ("path",), "model.", folder, problems)
    located.update(_located_groups(located, "", folder, problems))
    jobs = located.get("jobs")
    if isinstance(jobs, list):
        located["jobs"] = [
            {**job, **_located_groups(job, f"jobs.{n}.", folder, problems)} if isinstance(job, Mapping) else job
            for n, job in enumerate(jobs)
        ]
    return located, problems


def locate(path: str, folder: Path) -> tuple[str, str | None]:
    """Where `path` is, and a complaint if it is nowhere but must be a file.

    A path found from the current directory, or found nowhere, stays as it stands.
    """
    if path.startswith(("~", "$")):
        path = str(Path(os.path.expandvars(path)).expanduser())
    beside = folder / path
    if path.startswith("lowrank/") or path in STANDARD_INPUT or _is_there(Path(path)):
        return path, None
    if _is_there(beside):
        return str(beside), None
    problem = path_problem(Path(path)) or path_problem(beside)
    if problem:
        return path, problem
    if not (path.startswith((".", "/")) or Path(path).is_absolute() or path.lower().endswith(FILE_SUFFIXES)):
        return path, None
    places = [Path(path).absolute()] + ([beside.absolute()] if beside.absolute() != Path(path).absolute() else [])
    looked = f"looked for {' and '.join(shown(place) for place in places)}"
    if is_pattern(path):
        return path, f"no file is named like {shown(path)!r}; {looked}"
    near_names = _near_names(Path(path)) or _near_names(beside)
    hint = did_you_mean(Path(path).name, near_names)[:500] if near_names else ""
    return path, f"{shown(path)!r} was not found; {looked}{hint}"


def _is_there(path: Path) -> bool:
    """Whether there is something at `path`, or something that it is a pattern of."""
    try:
        return path.exists() or (is_pattern(str(path)) and next(iglob(str(path), recursive=True), None) is not None)
    except (OSError, ValueError):
        return False


def _near_names(path: Path) -> list[str]:
    """Names beside `path` that end as it does."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, _MOST_NAMES)]
    except (OSError, ValueError):
        return []
    return [name for name in names if Path(name).suffix.lower() == path.suffix.lower() and not name.startswith(".")]


def _located_groups(job: Mapping[str, Any], above: str, folder: Path, problems: list[str]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    data, adapter = job.get("data"), job.get("adapter")
    if isinstance(adapter, Mapping):
        groups["adapter"] = _located_keys(adapter, ("path",), f"{above}adapter.", folder, problems)
    objective = job.get("objective")
    if isinstance(objective, Mapping):
        groups["objective"] = _located_keys(objective, ("reward_model",), f"{above}objective.", folder, problems)
    if isinstance(data, Mapping):
        groups["data"] = dict(data)
        template = data.get("chat_template")
        if isinstance(template, str) and template.endswith(".jinja"):
            groups["data"] = _located_keys(data, ("chat_template",), f"{above}data.", folder, problems)
        for name in ("train", "eval"):
            if name in data:
                groups["data"][name] = _located_sources(data[name], f"{above}data.{name}", folder, problems)
    return groups


def _located_sources(sources: Any, place: str, folder: Path, problems: list[str]) -> Any:
    if isinstance(sources, (str, Mapping)):
        sources = [sources]
    if not isinstance(sources, (list, tuple)):
        return sources
    spelled = [{"path": source} if isinstance(source, str) else source for source in sources]
    return [
        _located_keys(source, ("path", "media_dir"), f"{place}.{n}.", folder, problems)
        if isinstance(source, Mapping)
        else source
        for n, source in enumerate(spelled)
    ]


def _located_keys(
    group: Mapping[str, Any], keys: tuple[str, ...], above: str, folder: Path, problems: list[str]
) -> dict[str, Any]:
    located = dict(group)
    for key in keys:
        value = group.get(key)
        if isinstance(value, (str, Path)):
            located[key], complaint = locate(str(value), folder)
            if complaint:
                problems.append(f"{above}{key}: {complaint}")
    return located

"""From what a person set on the page to the settings file of a run, confined to the board's folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowrank.board import form
from lowrank.board.places import OutsideError, Places, confined
from lowrank.board.sweep_form import as_sweep
from lowrank.dotted_keys import flat_settings

PATHS = {
    "adapter.path": "models", "objective.reward_model": "models", "objective.reference_model": "models",
    "data.tokenized_path": "data",
}  # fmt: skip
"""Settings of a job that name a file or folder, and within which folders. Beside these there are the base, sources of
data and templates."""


def settings_of(
    places: Places,
    name: str,
    values: Mapping[str, Any],
    jobs: Sequence[Mapping[str, Any]],
    extra: Mapping[str, Any],
    sweep: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The settings of a run called `name`. `extra` are groups the page cannot show as fields, kept as they came;
    `sweep` the rows of a search (sweep_form.py).

    OutsideError with every path that leads out of the folders the board may read; ConfigError for rows that are none.
    """
    settings = form.nested({key: value for key, value in values.items() if key not in ("output_dir", "jobs")})
    for key in ("model", "data"):  # the two that every run has stand first
        if key in settings:
            settings = {key: settings.pop(key), **settings}
    settings = {"model": settings.pop("model", {}), **settings} if "model" in settings else settings
    settings |= {key: value for key, value in extra.items() if key not in settings}
    rows = form.job_rows(jobs)
    if rows:
        settings["jobs"] = rows
    searched = as_sweep(sweep)
    if searched:
        known = settings.get("sweep")
        settings["sweep"] = {**searched, **(known if isinstance(known, Mapping) else {})}
    settings["output_dir"] = f"runs/{name}"
    confine(places, settings)
    return settings


def confine(places: Places, settings: Mapping[str, Any]) -> None:
    """OutsideError with every path in the settings that the board may not read."""
    problems = []
    for place, path, folders in _paths(places, settings):
        try:
            _check(str(path), folders)
        except OutsideError as error:
            problems.append(f"  - {place}: {error}")
    if problems:
        raise OutsideError("\n".join(["The settings cannot be used:", *problems]))


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """The same as `KEY=VALUE` words of a command line."""
    return [f"{key}={_value(value)}" for key, value in flat_settings(settings)]


def _check(path: str, folders: Sequence[Any]) -> None:
    if path.startswith("lowrank/"):
        return
    confined(path, folders)  # a hub's name is a relative path that is not there


def _paths(places: Places, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    folders = {"models": (places.folder, *places.models), "data": (places.folder, *places.data)}
    model = settings.get("model")
    path = model.get("path") if isinstance(model, Mapping) else model
    if path:
        yield "model.path", path, folders["models"]
    jobs = settings.get("jobs")
    entries = jobs if isinstance(jobs, list) else []
    groups = [("", settings), *((f"jobs.{n}.", job) for n, job in enumerate(entries) if isinstance(job, Mapping))]
    for above, group in (*groups, *_candidates(settings.get("sweep"))):
        for name, kind in PATHS.items():
            outer, _, key = name.partition(".")
            inner = group.get(outer)
            if isinstance(inner, Mapping) and inner.get(key):
                yield f"{above}{name}", inner[key], folders[kind]
        inner = group.get("data")
        sources = {"train": inner} if isinstance(inner, (str, list)) else inner
        if not isinstance(sources, Mapping):
            continue
        template = sources.get("chat_template")
        if isinstance(template, str) and template.endswith(".jinja"):
            yield f"{above}data.chat_template", template, folders["data"]
        for part in ("train", "eval"):
            listed = sources.get(part) or []
            for source in [listed] if isinstance(listed, (str, Mapping)) else listed:
                path = source.get("path") if isinstance(source, Mapping) else source
                if path:
                    yield f"{above}data.{part}", path, folders["data"]


def _candidates(sweep: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every value of a sweep as an entry of `jobs` that has it alone, and where in the settings it stands."""
    if not isinstance(sweep, Mapping):
        return
    parts: list[Any] = [sweep.get(name) or {} for name in ("grid", "random", "candidates")]
    grid, drawn, listed = parts
    for name, values in grid.items() if isinstance(grid, Mapping) else ():
        for value in values if isinstance(values, list) else [values]:
            yield f"sweep.grid.{name}: ", form.entry({name: value})
    for name, draw in drawn.items() if isinstance(drawn, Mapping) else ():
        choices = draw.get("choice") if isinstance(draw, Mapping) else None
        for value in choices if isinstance(choices, list) else ():
            yield f"sweep.random.{name}: ", form.entry({name: value})
    one_by_one: list[Any] = listed if isinstance(listed, list) else []
    for number, values in enumerate(one_by_one):
        if isinstance(values, Mapping):
            yield f"sweep.candidates.{number}: ", form.entry(values)


def _value(value: Any) -> str:
    """As YAML on one line."""
    import yaml

    if isinstance(value, str):
        return form.as_yaml({"x": value}).partition(":")[2].strip()
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value) and len(value) == 1:
        return _value(value[0])
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()

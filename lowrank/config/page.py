"""docs/settings.md, written from the schema: `python -m lowrank.config.page > docs/settings.md`."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

import lowrank.data.config
import lowrank.models.config
from lowrank.adapters.config import AdapterSettings
from lowrank.config.schema import JobSettings, RunConfig
from lowrank.search.config import Draw, SweepConfig
from lowrank.settings import Settings, configs_in
from lowrank.train.optimizers import OptimizerSettings
from lowrank.train.schedule import ScheduleConfig

TOP = """\
# Settings

<!-- Written by `python -m lowrank.config.page > docs/settings.md`; a test keeps it current. -->

A configuration is a YAML or JSON file. `lowrank show FILE` prints it with everything filled in,
`lowrank show --schema` prints the JSON schema, and words after the file override it:

    lowrank train run.yaml optimizer.learning_rate=1e-4 jobs.r8.adapter.rank=4

Unknown keys are errors. A bare value stands for the main setting of a group: `model: lowrank/tiny` is
`model: {path: lowrank/tiny}`, `data: rows.json` is `data: {train: [rows.json]}`, `adapter: rslora` is
`adapter: {type: rslora}`. YAML is read by its 1.2 rules: `1e-4` is a number, `no` is a text.

Relative paths of models, data, adapters and templates are looked for from the current directory, then
beside the configuration file. `output_dir` is meant from the current directory.

## Jobs

Entries of `jobs` are trained at the same time on the one base. An entry has a `name` and whatever
differs from the top level; groups are overridden setting by setting. Where an entry chooses another
`type` of adapter, the settings all types share (rank, alpha, ...) are still taken from the top; those
of one type alone are not.

    model: lowrank/tiny
    data: lowrank/demo
    output_dir: runs/ranks
    adapter: {rank: 8}
    jobs:
      - {name: r8}
      - {name: r64, adapter: {rank: 64}, optimizer: {learning_rate: 1e-4}}
      - {name: rs, adapter: {type: rslora}}
"""


SWEEP = """See [sweeps.md](sweeps.md).

"""

_HEADER = "| setting | value | default | meaning |\n| --- | --- | --- | --- |"
_GROUPS: dict[str, type[Settings]] = {
    "": RunConfig,
    "model": lowrank.models.config.ModelConfig,
    "data": lowrank.data.config.DataConfig,
    "adapter": AdapterSettings,
    "optimizer": OptimizerSettings,
    "schedule": ScheduleConfig,
}
"""Groups of settings and what all their types share, by the name that stands before the dot."""


def settings_page() -> str:
    """The whole page, as markdown."""
    run_only = [name for name in RunConfig.model_fields if name not in JobSettings.model_fields]
    parts = [
        TOP,
        "## Top level, for the whole run\n\n" + _table(RunConfig, run_only),
        "## Top level, or in an entry of `jobs`\n\n" + _table(RunConfig, list(JobSettings.model_fields)),
        "## `model`\n\n" + _table(lowrank.models.config.ModelConfig),
        _choices("model.storage", "lowrank.models.storages", Settings),
        "## `data`\n\n" + _table(lowrank.data.config.DataConfig),
        "### Entries of `data.train` and `data.eval`\n\n" + _table(lowrank.data.config.SourceConfig),
        "## `adapter`\n\n" + _table(AdapterSettings),
        _choices("adapter", "lowrank.adapters.variants", AdapterSettings),
        _choices("objective", "lowrank.objectives", Settings).replace("###", "##", 1),
        "## `optimizer`\n\n" + _table(OptimizerSettings),
        _choices("optimizer", "lowrank.train.optimizers", OptimizerSettings),
        "## `schedule`\n\n" + _table(ScheduleConfig),
        "## `sweep`\n\n" + SWEEP + _table(SweepConfig),
        "### Entries of `sweep.random`\n\n" + _table(Draw),
    ]
    return "\n".join(parts)


def settings_table(paths: Sequence[str]) -> str:
    """Some settings, by their paths (`adapter.rank`), with what stands in the schema. KeyError for one that is not
    there."""
    lines = [_HEADER]
    for path in paths:
        group, _, name = path.rpartition(".")
        lines.append(_row(path, _GROUPS[group].model_fields[name]))
    return "\n".join(lines) + "\n"


def _table(group: type[Settings], names: list[str] | None = None) -> str:
    lines = [_HEADER, *(_row(name, group.model_fields[name]) for name in names or list(group.model_fields))]
    return "\n".join(lines) + "\n"


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", _kind(field), _default(field), " ".join((field.description or "").split()))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _choices(place: str, package: str, shared: type[Settings]) -> str:
    """The types of a group, with the settings each adds to the shared ones."""
    lines = [f"### Types of `{place}`\n"]
    for name, config in configs_in(package).items():
        lines.append(f"- `{name}`: {' '.join((config.__doc__ or '').split())}")
        own = [key for key in config.model_fields if key not in shared.model_fields and key != "type"]
        lines += [
            f"    - `{key}` ({_kind(config.model_fields[key])}): {config.model_fields[key].description}" for key in own
        ]
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, Settings) or (field.default_factory is dict and _groups(field.annotation)):
        return ""
    return f"`{json.dumps(default, default=str, ensure_ascii=False)}`"


def _groups(annotation: Any) -> bool:
    return any(isinstance(part, type) and issubclass(part, Settings) for part in _parts(annotation))


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


_TYPE_NAMES = {
    int: "whole number",
    float: "number",
    bool: "true, false",
    str: "text",
    Path: "path",
    types.NoneType: "null",
    Any: "anything",
}


def _kind(field: FieldInfo) -> str:
    names = list(dict.fromkeys(_type_name(field.annotation)))
    return ", ".join(name for name in names if name)


def _type_name(annotation: Any) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _TYPE_NAMES:
        yield _TYPE_NAMES[annotation]
    elif origin is Annotated:
        yield from _type_name(arguments[0])
    elif origin is Literal:
        yield from (f"`{value}`" for value in arguments)
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _type_name(argument)
    elif origin is tuple:
        inner = ", ".join(dict.fromkeys(name for argument in arguments[:1] for name in _type_name(argument)))
        yield f"list of {inner}"
    elif origin is dict:
        yield "group of any keys"
    else:
        yield "group"


if __name__ == "__main__":
    print(settings_page(), end="")

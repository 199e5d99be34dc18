"""`lowrank data`: the doctor, on a configuration or on a file alone."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank.cli.media_dir import FetchMedia, MediaDir
from lowrank.cli.warn import warn

if TYPE_CHECKING:
    from lowrank.config import RunConfig
    from lowrank.data.report.statistics import DataReport

_LARGE_FILE = 256 << 20
"""Bytes from which a file is read as a stream."""
_LARGEST_CONFIG = 1 << 20


def data(
    target: Annotated[
        str,
        typer.Argument(metavar="CONFIG|FILE", help="A configuration (YAML), or a file, folder or hub name of data."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="For a configuration: as data.max_length=512.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Count tokens as this model does (a folder or hub name).")
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="Format of a file, instead of recognizing it: alpaca, sharegpt, ...")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="A column of a file that is known to be of no use; repeatable.")
    ] = None,
    media_dir: MediaDir = None,
    fetch_media: FetchMedia = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Any loss of data or column that nobody reads is an error (exit 3)."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Shows what is read, left out and cut, and why; repeated and leaked rows; what carries loss; rendered samples.

    No weights are loaded.
    """
    given = {"format": format, "ignored_columns": ignore or (), "media_dir": media_dir, "fetch_media": fetch_media}
    if _is_config(target):
        if key := next((key for key, value in given.items() if value), None):
            raise typer.BadParameter(f"goes with a data file; in a configuration it is data.train.0.{key}")
        reports = _of_config(Path(target), overrides or [], model)
    else:
        if overrides:
            raise typer.BadParameter(f"KEY=VALUE goes with a configuration file, and {target} is data")
        reports = [_of_file(target, model, given)]
    _show(reports, strict, json)


def _is_config(target: str) -> bool:
    """A YAML file, or a JSON file that names a model."""
    path = Path(target)
    if path.suffix.lower() in (".yaml", ".yml"):
        return True
    if path.suffix.lower() != ".json" or not 0 < _size(path) <= _LARGEST_CONFIG:
        return False
    try:
        content = json_format.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and not content.keys().isdisjoint({"model", "model_name_or_path"})


def _size(path: Path) -> int:
    """Bytes of the file, 0 if there is none."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


def _of_config(path: Path, overrides: list[str], model: str | None) -> list[tuple[str, DataReport]]:
    """A heading and a report for every job, equal jobs together."""
    from lowrank.compat import load_any
    from lowrank.data.chat.rendering import Renderer
    from lowrank.data.prepare import examine

    config, warnings = load_any(path, overrides)
    warn(warnings)
    tokenizer, counted = _tokenizer(model, config)
    groups: dict[str, list[Any]] = {}
    for job in config.jobs:
        key = json_format.dumps([job.data.model_dump(mode="json"), job.objective.type, job.seed], sort_keys=True)
        groups.setdefault(key, []).append(job)
    reports = []
    for jobs in groups.values():
        first = jobs[0]
        record = first.objective.build().record
        report = examine(first.data, renderer=Renderer(tokenizer, first.data), record=record, seed=first.seed)
        names = ", ".join(job.name for job in jobs)
        reports.append((f"{'job' if len(jobs) == 1 else 'jobs'} {names}, {counted}", report))
    return reports


def _of_file(target: str, model: str | None, given: dict[str, Any]) -> tuple[str, DataReport]:
    """`given`: settings of the dataset."""
    from lowrank.data.chat.characters import CharacterRenderer
    from lowrank.data.chat.modelless import ModellessRenderer
    from lowrank.data.chat.rendering import Renderer
    from lowrank.data.config import DataConfig, SourceConfig
    from lowrank.data.prepare import examine

    path = Path(target)
    large = _size(path) > _LARGE_FILE
    source = SourceConfig(path=target, **given)
    config = DataConfig(train=(source,), streaming=large)
    tokenizer, counted = _tokenizer(model, None)
    with_tokenizer = ModellessRenderer if model is None else Renderer
    renderer = CharacterRenderer() if tokenizer is None else with_tokenizer(tokenizer, config)
    return f"{target}, {counted}", examine(config, renderer=renderer)


def _tokenizer(model: str | None, config: RunConfig | None) -> tuple[Any, str]:
    """The tokenizer and how lengths are counted, in words; None where there is none to be had."""
    from lowrank.models.config import named_model
    from lowrank.models.loading.tokenizer import load_tokenizer
    from lowrank.models.packaged import TINY, locate

    if model is not None:
        return load_tokenizer(named_model(model)), f"in tokens of {model}"
    if config is not None:
        return load_tokenizer(config.model), f"in tokens of {config.model.path}"
    if (Path(locate(TINY)) / "tokenizer.json").is_file():
        return load_tokenizer(named_model(TINY)), f"in tokens of {TINY} (name your model with --model)"
    return None, "in characters (name your model with --model to count tokens)"


def _show(reports: list[tuple[str, DataReport]], strict: bool, as_json: bool) -> None:
    """Print the reports, then raise DataError for what cannot be trained on."""
    from lowrank.data.prepare import refuse
    from lowrank.data.report.doctor import render_report
    from lowrank.errors import DataError
    from lowrank.terminal import Console

    console = Console(highlight=False)
    if as_json:
        content = [{"of": heading, **report.to_json()} for heading, report in reports]
        print(json_format.dumps({"reports": content}, ensure_ascii=False))
    for heading, report in () if as_json else reports:
        console.rule(heading, align="left", style="dim")
        console.print(render_report(report, marks=not console.is_terminal or console.no_color))
    for _, report in reports:
        try:
            refuse(report, strict=strict)
        except DataError as error:
            if not as_json:
                raise
            raise typer.Exit(error.exit_code) from error  # the report says why

"""`lowrank show`: the configuration with everything filled in, in its native form."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank.cli.shared_options import Overrides
from lowrank.cli.warn import warn

if TYPE_CHECKING:
    from lowrank.config import RunConfig


def show(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML or JSON file, native or LLaMA-Factory's; settings alone, as model=... data.train=...; or the "
            "folder of a run.",
        ),
    ] = None,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a configuration.")] = False,
) -> None:
    """A LLaMA-Factory file is printed in its native form. The output is a configuration file itself.

    Of a run folder: what came out of it, the table of its sweep first.
    """
    if schema:  # as it is shipped: what fills a form need not wait for torch
        print((Path(__file__).parent.parent / "config" / "schema.json").read_text(encoding="utf-8"), end="")
        return
    import yaml

    from lowrank.compat import load_any

    if config is None:
        raise typer.BadParameter("give a configuration file, a run folder, or --schema", param_hint="CONFIG")
    if config.is_dir():
        show_run(config, json)
        return
    settings, warnings = load_any(config, overrides or [])
    warn(warnings)
    content = resolved(settings)
    if json:
        print(json_format.dumps(content, indent=2, ensure_ascii=False))
    else:
        print(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120), end="")


def show_run(run: Path, json: bool) -> None:
    """What came out of a run. OutputError if nothing did yet."""
    from lowrank.checkpoints.run_folder import SWEEP_TABLE
    from lowrank.errors import OutputError
    from lowrank.foreign_files import find_json
    from lowrank.report.summary import SUMMARY
    from lowrank.report.summary_view import render_summary
    from lowrank.report.sweep_view import render_sweep
    from lowrank.terminal import Console

    sweep, summary = find_json(run / SWEEP_TABLE), find_json(run / SUMMARY)
    if sweep is None and summary is None:
        raise OutputError(
            f"{run}: there is neither {SUMMARY} nor {SWEEP_TABLE} in it; see `lowrank jobs` for one that trains"
        )
    if json:
        print(json_format.dumps({"summary": summary, "sweep": sweep}, ensure_ascii=False))
        return
    console = Console(highlight=False)
    if sweep is not None:
        console.print(render_sweep(sweep))
    if summary is not None:
        console.print(render_summary(summary))


def resolved(config: RunConfig) -> dict[str, Any]:
    """The native form, complete and without repetition: a job lists only the groups in which it differs from the top.

    Reading it again gives an equal configuration.
    """
    from lowrank.config.schema import DEFAULT_JOB

    first = ("model", "output_dir", "data", "adapter", "objective", "optimizer", "schedule")
    content = config.model_dump(mode="json")
    jobs = [{"name": job.pop("name"), **{k: v for k, v in job.items() if v != content[k]}} for job in content["jobs"]]
    rest = [key for key in content if key not in (*first, "jobs")]
    ordered = {key: content[key] for key in (*first, *rest)}
    return ordered if jobs == [{"name": DEFAULT_JOB}] else {**ordered, "jobs": jobs}

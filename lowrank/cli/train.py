"""`lowrank train`: a configuration file in, adapters out."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from lowrank.cli.shared_options import Overrides
from lowrank.cli.warn import warn

NOT_FINITE = 7
"""The exit code where a job has ended so; see EXIT_CODES."""


def train(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML or JSON file, native or LLaMA-Factory's; or settings alone, as model=... data.train=...",
        ),
    ],
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print events and the summary as JSON.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop if a row would be dropped or cut, or not all read.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only what is wrong.")] = False,
) -> None:
    """Ctrl-C saves a checkpoint, and so do SIGTERM, SIGHUP and a file `stop` in the run folder; run the same command
    with resume=true to go on.
    """
    from lowrank.cli.interrupts import end_as_usual
    from lowrank.compat import load_any
    from lowrank.pipelines.launch import train as run_train
    from lowrank.ranks import is_first
    from lowrank.report.reporters import view_for

    settings, warnings = load_any(config, overrides or [])
    first = is_first()  # of the processes that torchrun has started, the one that speaks
    if first:
        warn(warnings)
    views = [view_for(json=json, quiet=quiet)] if first else []
    try:
        summary = run_train(settings, reporters=views, strict=strict)
    finally:
        end_as_usual()
    if json and first:
        print(json_format.dumps(summary, ensure_ascii=False, default=str))
    if summary.get("interrupted"):
        raise typer.Exit(130)
    if any(job["finished"] == "not_finite" for job in summary["jobs"].values()):
        raise typer.Exit(NOT_FINITE)

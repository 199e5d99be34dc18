"""`lowrank train`: a configuration file in, adapters out."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from lowrank.cli.warn import warn


def train(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML or JSON file, native or LLaMA-Factory's; or settings alone, as model=... data.train=...",
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As optimizer.learning_rate=1e-4.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print events and the summary as JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop if any row would be dropped or cut.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only what is wrong.")] = False,
) -> None:
    """Ctrl-C saves a checkpoint; run the same command with resume=true to go on."""
    from lowrank.compat import load_any
    from lowrank.run import train as run_train
    from lowrank.train.reporters import view_for

    settings, warnings = load_any(config, overrides or [])
    warn(warnings)
    summary = run_train(settings, reporters=[view_for(json=json, quiet=quiet)], strict=strict)
    if json:
        print(json_format.dumps(summary, ensure_ascii=False, default=str))
    if summary.get("interrupted"):
        raise typer.Exit(130)

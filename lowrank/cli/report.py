"""`lowrank report`: the page about a run, with what was predicted and evaluated since."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print the page's path as JSON.")] = False,
) -> None:
    """One page that needs nothing else; training writes it too. After `predict` or `eval` it shows their results."""
    from lowrank.report.page import write_report

    path = write_report(run)
    print(json_format.dumps({"report": str(path)}) if json else path)

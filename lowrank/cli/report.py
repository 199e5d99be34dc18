"""`lowrank report`: the page about a run, with what was predicted and evaluated since."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from lowrank.cli.warn import warn


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    samples: Annotated[
        int, typer.Option(min=0, help="First ask the base and every adapter so many held-out questions of the run.")
    ] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the page's path as JSON.")] = False,
) -> None:
    """One page that needs nothing else; training writes it too. After `predict` or `eval` it shows their results.

    With `--samples 6` it also shows what the base and the adapters say to six held-out questions. Of a run in shares
    (devices, share), what they have come to so far is merged first.
    """
    from lowrank.report.page import write_report

    if samples:
        from lowrank.pipelines.samples import answer_samples

        answer_samples(run, samples, lambda text: warn([text]))
    from lowrank.pipelines.merge_shares import is_shared, merge_shares

    if is_shared(run):
        merge_shares(run, lambda text: warn([text]))
    path = write_report(run)
    print(json_format.dumps({"report": str(path)}) if json else path)

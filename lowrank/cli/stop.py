"""`lowrank stop`: end a job of a run that trains, or the run."""

from __future__ import annotations

from typing import Annotated

import typer

from lowrank.cli import orders


def stop(
    run: orders.Run,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The job; without it the whole run saves and ends.")
    ] = None,
    timeout: orders.Timeout = None,
    json: orders.Json = False,
) -> None:
    """The job's adapter is kept as `last`, its slot is free for one that waits, and the others go on."""
    orders.give(run, lambda live: live.end() if name is None else live.stop(name), timeout=timeout, json=json)

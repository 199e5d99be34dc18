"""`lowrank stop`: end a job of a run that trains, or the run."""

from __future__ import annotations

from typing import Annotated

import typer

from lowrank.cli import live_commands


def stop(
    run: live_commands.Run,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The job; without it the whole run saves and ends.")
    ] = None,
    timeout: live_commands.Timeout = None,
    json: live_commands.Json = False,
) -> None:
    """The job's adapter is kept as `last`, its slot is free for one that waits, and the others go on."""
    live_commands.send(run, lambda live: live.end() if name is None else live.stop(name), timeout=timeout, json=json)

"""`lowrank clone`: a second job like one of a run that trains, with other settings."""

from __future__ import annotations

from typing import Annotated

import typer

from lowrank.cli import live_commands


def clone(
    run: live_commands.Run,
    name: live_commands.Job,
    changes: live_commands.Changes = None,
    new_name: Annotated[str | None, typer.Option("--name", help="What it is called; NAME-2 at first.")] = None,
    from_start: Annotated[bool, typer.Option("--from-start", help="Begin anew, not from the present weights.")] = False,
    timeout: live_commands.Timeout = None,
    json: live_commands.Json = False,
) -> None:
    """It goes on from the present weights, optimizer state and place in the data, or with --from-start begins anew,
    where everything may differ, the adapter too.
    """
    given = live_commands.changes(changes)
    live_commands.send(
        run,
        lambda live: live.clone(name, given, new_name=new_name, from_start=from_start),
        timeout=timeout,
        json=json,
    )

"""`lowrank priority`: who is given a slot first."""

from __future__ import annotations

from typing import Annotated

import typer

from lowrank.cli import live_commands


def priority(
    run: live_commands.Run,
    name: live_commands.Job,
    number: Annotated[int, typer.Argument(metavar="NUMBER", help="0 at first; higher comes first.")],
    timeout: live_commands.Timeout = None,
    json: live_commands.Json = False,
) -> None:
    """Of the jobs that wait, the one with the highest is given the next slot; one of a lower priority that runs gives
    its slot to it at once, and goes on later where it was. Negative numbers stand after `--`.
    """
    live_commands.send(run, lambda live: live.priority(name, number), timeout=timeout, json=json)

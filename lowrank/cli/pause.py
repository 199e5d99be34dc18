"""`lowrank pause`: let a job of a run that trains take no steps for now."""

from __future__ import annotations

from lowrank.cli import live_commands


def pause(
    run: live_commands.Run,
    name: live_commands.Job,
    timeout: live_commands.Timeout = None,
    json: live_commands.Json = False,
) -> None:
    """Its slot is free for a job that waits; `lowrank resume RUN NAME` lets it go on where it was, to the bit."""
    live_commands.send(run, lambda live: live.pause(name), timeout=timeout, json=json)

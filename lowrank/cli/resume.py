"""`lowrank resume`: let a job go on that was paused."""

from __future__ import annotations

from lowrank.cli import live_commands


def resume(
    run: live_commands.Run,
    name: live_commands.Job,
    timeout: live_commands.Timeout = None,
    json: live_commands.Json = False,
) -> None:
    """It goes on where it was as soon as there is a slot. (A run that has ended goes on with `lowrank train ...
    resume=true`.)
    """
    live_commands.send(run, lambda live: live.resume(name), timeout=timeout, json=json)

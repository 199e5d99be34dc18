"""`lowrank resume`: let a job go on that was paused."""

from __future__ import annotations

from lowrank.cli import orders


def resume(run: orders.Run, name: orders.Job, timeout: orders.Timeout = None, json: orders.Json = False) -> None:
    """It goes on where it was as soon as there is a slot. (A run that has ended goes on with `lowrank train ...
    resume=true`.)
    """
    orders.give(run, lambda live: live.resume(name), timeout=timeout, json=json)

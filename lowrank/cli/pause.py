"""`lowrank pause`: let a job of a run that trains take no steps for now."""

from __future__ import annotations

from lowrank.cli import orders


def pause(run: orders.Run, name: orders.Job, timeout: orders.Timeout = None, json: orders.Json = False) -> None:
    """Its slot is free for a job that waits; `lowrank resume RUN NAME` lets it go on where it was, to the bit."""
    orders.give(run, lambda live: live.pause(name), timeout=timeout, json=json)

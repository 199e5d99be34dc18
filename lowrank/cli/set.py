"""`lowrank set`: other settings for a job of a run that trains."""

from __future__ import annotations

from typing import Annotated

import typer

from lowrank.cli import live_commands


def set(
    run: live_commands.Run,
    name: live_commands.Job,
    changes: Annotated[list[str], typer.Argument(metavar="KEY=VALUE ...", help="As optimizer.learning_rate=1e-5.")],
    timeout: live_commands.Timeout = None,
    json: live_commands.Json = False,
) -> None:
    """From its next step on. What may change: optimizer.learning_rate, optimizer.max_grad_norm,
    optimizer.max_skipped_steps, schedule, max_steps, num_train_epochs, early_stopping_patience.
    """
    given = live_commands.changes(changes)
    live_commands.send(run, lambda live: live.set(name, given), timeout=timeout, json=json)

"""`lowrank jobs`: what the jobs of a run do now."""

from __future__ import annotations

import dataclasses
import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from lowrank.report.live import LiveJob


def jobs(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, training or not.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """A line for each: what it does, how far it is, its losses, what its curve says, how long it still takes.

    While it trains it takes commands: add, stop, pause, resume, clone, set, priority.
    """
    from lowrank.api.live import LiveRun
    from lowrank.terminal import Console

    live = LiveRun(run)
    found, training = live.jobs(), live.training
    if json:
        content = {"training": training, "jobs": [dataclasses.asdict(job) for job in found]}
        print(json_format.dumps(content, ensure_ascii=False))
        return
    console = Console(highlight=False)
    state = "is training" if training else "is not training"
    console.print(f"{run} {state}", markup=False, soft_wrap=True)
    if found:
        console.print(table(found))
    elif training:
        console.print("it has not begun its first step")


def table(jobs: Sequence[LiveJob]) -> Table:
    """The jobs for people."""
    from rich.table import Table
    from rich.text import Text

    from lowrank.report import formatting

    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    shown.add_column("job", style="bold", overflow="fold")
    for title in ("", "step", "loss", "held-out", "best", "lr", "left"):
        shown.add_column(title, justify="left" if not title else "right", no_wrap=True)
    shown.add_column("curve")
    for job in jobs:
        priority = f" ({job.priority:+d})" if job.priority else ""
        shown.add_row(
            Text(job.name),
            job.state.replace("_", " ") + priority,
            f"{job.step}/{job.num_steps}",
            formatting.loss(job.loss),
            formatting.loss(job.held_out_loss),
            formatting.loss(job.best_loss),
            formatting.learning_rate(job.learning_rate),
            "" if job.seconds_left is None else formatting.duration(job.seconds_left),
            job.verdict.replace("_", " "),
        )
    return shown

"""What the commands that steer a run have in common: each sends one live command and prints the run's reply."""

from __future__ import annotations

import json as json_format
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank.errors import ConfigError

if TYPE_CHECKING:
    from lowrank.api.live import LiveRun

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that is training.")]
Job = Annotated[str, typer.Argument(metavar="NAME", help="A job of it; `lowrank jobs RUN` lists them.")]
Changes = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As optimizer.learning_rate=1e-5.")]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Timeout = Annotated[
    float | None,
    typer.Option(min=0, help="Seconds to wait for the answer, which comes after the running step; no limit at first."),
]


def send(run: Path, command: Callable[[LiveRun], str], *, timeout: float | None, json: bool) -> None:
    """Send a command and print the reply."""
    from lowrank.api.live import LiveRun
    from lowrank.terminal import visible

    text = command(LiveRun(run, timeout=timeout))
    print(json_format.dumps({"answer": text}, ensure_ascii=False) if json else visible(text))


def changes(overrides: Sequence[str] | None) -> dict[str, Any]:
    """`key=value` words as settings; values are read as YAML where they are used."""
    found = {}
    for override in overrides or ():
        key, equals, value = override.partition("=")
        if not key or not equals:
            raise ConfigError(f"{override!r}: expected key=value, for example optimizer.learning_rate=1e-5")
        found[key] = value
    return found

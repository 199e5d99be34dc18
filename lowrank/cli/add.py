"""`lowrank add`: one job more for a run that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank.cli import live_commands


def add(
    run: live_commands.Run,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A YAML or JSON file: whatever differs from the run's top level.")
    ],
    changes: live_commands.Changes = None,
    timeout: live_commands.Timeout = None,
    json: live_commands.Json = False,
) -> None:
    """The file is like an entry of `jobs`; without a `name` the job is called as the file. It begins at once if it
    fits into memory, else it waits for a slot.
    """
    from lowrank.config import override, read_file

    content = override(read_file(file), changes or [])
    content.setdefault("name", file.stem)
    live_commands.send(run, lambda live: live.add(content, folder=file.parent), timeout=timeout, json=json)

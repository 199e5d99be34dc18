"""Options that several commands have alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelPath = Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, an adapter folder, or a model.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As optimizer.learning_rate=1e-4.")]
OnlyAdapters = Annotated[
    list[str] | None, typer.Option("--adapter", help="Only these (r8,r64 or given twice); else all and the base.")
]
Base = Annotated[str | None, typer.Option(help="Where the base of the run or adapter is now.")]
Last = Annotated[bool, typer.Option("--last", help="The last adapters of a run instead of the best.")]
ChatTemplate = Annotated[
    str | None, typer.Option(help="A built-in template (chatml, llama3, ...) or a .jinja file, instead of its own.")
]
RunChatTemplate = Annotated[str | None, typer.Option(help="Instead of the run's own.")]
ResultFolder = Annotated[Path | None, typer.Option(help="Folder for the results; left out: in the run folder.")]
Host = Annotated[str, typer.Option(help="Address to listen on; others than this machine's need a token.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
NewFolder = Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not exist.")]
JsonResult = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

"""`lowrank board`: everything lowrank does, in a browser."""

from __future__ import annotations

import json as json_format
import os
from pathlib import Path
from typing import Annotated

import typer

from lowrank.cli.shared_options import Host, Port
from lowrank.errors import OutputError


def board(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where runs, data and exports lie.")] = Path("."),
    port: Port = 8600,
    host: Host = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(help="The key of the board; left out: LOWRANK_BOARD_TOKEN, or one that is made once and kept."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="Another name this board is called by.")
    ] = None,
    models: Annotated[
        list[Path] | None, typer.Option("--models", help="A further folder with models that may be read.")
    ] = None,
    data: Annotated[list[Path] | None, typer.Option("--data", help="A further folder with data that may be read.")] = (
        None
    ),
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Runs may import code of others (my_module:MyThing, remote code).")
    ] = False,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the address as JSON.")] = False,
) -> None:
    """Ctrl-C closes the page; runs go on, and the next `lowrank board` finds them.

    The page reads and writes the folder, and reads those named with --models and --data. Every button is one command,
    shown beside it.
    """
    from lowrank.serve.address import check_host, check_installed

    check_installed("the board", "board")
    from lowrank.board.places import Places
    from lowrank.board.serve import run
    from lowrank.board.state import Options

    token = token or os.environ.get("LOWRANK_BOARD_TOKEN") or None
    check_host(host, token)
    for each in (*(models or ()), *(data or ())):
        if not each.is_dir():
            raise OutputError(f"{each}: no such folder")
    places = Places(folder.resolve(), tuple(p.resolve() for p in models or ()), tuple(p.resolve() for p in data or ()))

    def announce(address: str) -> None:
        if json:
            print(json_format.dumps({"event": "listening", "url": address, "folder": str(places.folder)}), flush=True)
        else:
            print(f"The board is at {address}\nCtrl-C closes it; runs go on.", flush=True)
        if open_browser:
            import webbrowser

            webbrowser.open(address)

    run(
        places,
        Options(allow_code=allow_code),
        host=host,
        port=port,
        token=token,
        hosts=allow_host or (),
        announce=announce,
    )

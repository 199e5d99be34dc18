"""The options about media of every command that reads a data file."""

from __future__ import annotations

from typing import Annotated

import typer

MediaDir = Annotated[
    str | None,
    typer.Option(
        "--media-dir",
        help="The folder of the pictures, videos and sounds that its rows name, instead of the file's own.",
    ),
]
FetchMedia = Annotated[bool, typer.Option("--fetch-media", help="Fetch those that its rows name by URL (fetch_media).")]

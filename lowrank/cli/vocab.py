"""`lowrank vocab`: a copy of a model with more tokens in its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def vocab(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a checkpoint, or a hub name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not exist.")],
    tokens: Annotated[str, typer.Option("--tokens", "-t", help="New tokens, with commas between them.")] = "",
    special_tokens: Annotated[
        str, typer.Option("--special-tokens", "-s", help="New tokens that are left out of decoded text.")
    ] = "",
) -> None:
    """The copy is an ordinary model: it is trained, served, merged and converted like any other. Weight files that do
    not change are linked, not copied, where the disk allows it. An adapter learns the new tokens with
    `adapter.trainable_token_indices`.
    """
    from lowrank.export.more_tokens import add_tokens
    from lowrank.models.config import Config
    from lowrank.models.depths import KEY
    from lowrank.planning.simulation import read_config
    from lowrank.to_take_home import on_disk

    given = [[token for token in text.split(",") if token] for text in (tokens, special_tokens)]
    grown = add_tokens(on_disk(Config(path=model)), output, *given)
    rows = f"{grown.new_rows} rows more" if grown.new_rows else "rows to spare were taken"
    numbers = ", ".join(map(str, grown.token_ids))
    typer.echo(f"{len(grown.token_ids)} new tokens ({rows}), numbers {numbers}, in {output}")
    names = ", ".join(f'"{token}"' for own in given for token in own)
    adapted = f"'adapter.trainable_token_indices=[{names}]'"
    if getattr(read_config(Config(path=str(output))), KEY, None) is not None:
        adapted = "tuning=full, since a mixture of depths takes no adapters"
    typer.echo(f"train them with model={output} {adapted}")

"""`lowrank quantize`: a base in 4 or 8 bits, written in the format that bitsandbytes and transformers read."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a 16-bit checkpoint, or a hub name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not exist.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Of the storage or the model: block_size=128, dtype=float16."),
    ] = None,
    storage: Annotated[str, typer.Option("--storage", help="nf4, fp4 or int8.")] = "nf4",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Layers are packed one by one as they are read, so a model need not fit in memory in 16 bit.

    `model.path: DIR` then trains on it as it is; `model.storage` is left out, since it is quantised already.
    """
    from lowrank.cli.warn import warn
    from lowrank.quantized import quantize_model

    result = quantize_model(model, output, storage, settings or [], notify=lambda sentence: warn([sentence]))
    if json:
        print(json_format.dumps(result, ensure_ascii=False))
        return
    typer.echo(
        f"{result['layers']} layers in {result['storage']}, {result['bits_per_parameter']:.3f} bits per parameter "
        f"({result['way']}); {result['bytes'] / 1e9:.3g} GB in {output}, of {result['original_bytes'] / 1e9:.3g} GB"
    )
    typer.echo(f"train on it with model.path={output}")

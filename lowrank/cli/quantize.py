"""`lowrank quantize`: a base in 4 or 8 bits, in the format that bitsandbytes and transformers read."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from lowrank.cli.shared_options import JsonResult


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a 16-bit checkpoint, or a hub name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As model.storage.block_size=128, model.dtype=...")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to write; it must not exist.")
    ] = None,
    storage: Annotated[str, typer.Option("--storage", help="nf4, fp4 or int8.")] = "nf4",
    json: JsonResult = False,
) -> None:
    """Layers are packed one by one as they are read, so the model need not fit into memory in 16 bit.

    A run trains on the result with `model: DIR`, and without `model.storage`, since it is quantized already.
    """
    if output is None:
        raise typer.BadParameter("say where to write the model: -o DIR", param_hint="-o")
    from lowrank.checkpoints.packed_model import quantize_model
    from lowrank.cli.warn import warn
    from lowrank.config.read import override
    from lowrank.errors import ConfigError
    from lowrank.models.config import ModelConfig
    from lowrank.setting_problems import settings_of

    settings = override({"model": {"path": model, "storage": {"type": storage}}}, overrides or [])
    others = settings.keys() - {"model"}
    if others:
        raise ConfigError(f"only settings of model matter here, not {', '.join(sorted(others))}")
    config = settings_of(ModelConfig, settings["model"], "these settings cannot be used")
    result = quantize_model(config, output, notify=lambda sentence: warn([sentence]))
    if json:
        print(json_format.dumps(result, ensure_ascii=False))
        return
    typer.echo(
        f"{result['layers']} layers in {storage}, {result['bits_per_parameter']:.3f} bits per parameter "
        f"(quantized by {result['quantized_by']}); {result['bytes'] / 1e6:,.1f} MB in {output}, of "
        f"{result['original_bytes'] / 1e6:,.1f} MB"
    )
    typer.echo(f"train on it with model={output}")

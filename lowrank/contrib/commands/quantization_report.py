"""`lowrank quantization-report`: what quantizing would do to a checkpoint, as a table, JSON and a plot."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer


def quantization_report(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a 16-bit checkpoint, or a hub name.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="A PNG of error against bits.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Nothing is written: every method is measured on the model's own weights, one matrix at a time."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from lowrank.checkpoints.atomic import new_file
    from lowrank.contrib.quantization_report.measures import QuantizationReport
    from lowrank.contrib.quantization_report.plot import plot as draw
    from lowrank.terminal import Console

    weights = linear_weights(model, revision)
    found = QuantizationReport()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=sum(stored.nbytes for stored in weights.values()))
        for name, stored in weights.items():
            progress.update(task, description=name)
            found.add(name.removesuffix(".weight"), stored.read())
            progress.advance(task, stored.nbytes)
    rows = found.rows()
    if plot is not None:
        with new_file(plot) as partial:
            draw(rows, partial, f"{model}: {found.layers} linear layers")
    if json:
        sizes = {"layers": found.layers, "weights": found.weights, "weights_looked_at": found.looked_at}
        content = {"model": model, **sizes, "group_size": found.group_size, "methods": rows}
        print(json_format.dumps(content, ensure_ascii=False))
        return
    _print_table(model, found, rows)
    if plot is not None:
        typer.echo(f"plot: {plot}")


def linear_weights(model: str, revision: str | None) -> dict[str, Any]:
    """The lazy tensors that quantizing is about: matrices in float, but for embeddings, head and experts' routers."""
    from lowrank.errors import ModelError, first_line
    from lowrank.models.loading.checkpoint_files import checkpoint_files, stored_tensors
    from lowrank.models.loading.pretrained import locate
    from lowrank.models.storages.packed import DENSE_MODULES

    try:
        stored = stored_tensors(checkpoint_files(locate(model), revision))
    except OSError as error:
        raise ModelError(f"{model}: {first_line(error)}; a folder with safetensors is needed") from error
    kept = ("embed", "wte", "wpe", "word_embeddings")
    found = {
        name: tensor
        for name, tensor in stored.items()
        if len(tensor.shape) in (2, 3)
        and min(tensor.shape[-2:]) >= 16
        and tensor.dtype.is_floating_point
        and tensor.dtype.itemsize >= 2
        and name.removesuffix(".weight").rsplit(".", 1)[-1] not in DENSE_MODULES
        and not any(part in name for part in kept)
        and not name.endswith(("scales", "weight_scale", "absmax"))
    }
    packed = [name for name, tensor in stored.items() if len(tensor.shape) == 2 and tensor.dtype.itemsize in (1, 4)]
    packed = [name for name in packed if not stored[name].dtype.is_floating_point or stored[name].dtype.itemsize == 1]
    if packed:
        raise ModelError(
            f"{model}: {packed[0]} is {stored[packed[0]].dtype}, so the checkpoint is quantized already; "
            "give the 16-bit checkpoint it was made from"
        )
    if not found:
        raise ModelError(f"{model}: no weight of a linear layer in its safetensors files")
    return found


def _print_table(model: str, found: Any, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from lowrank.terminal import Console

    share = found.looked_at / found.weights
    part = "" if share > 0.999 else f"; {share:.0%} of the weights looked at, rows spread over every matrix"
    table = Table(title=f"{model}: {found.layers} linear layers, {found.weights / 1e6:,.1f} M weights{part}")
    for heading in ("method", "levels", "zero", "bits/param", "MSE", "relative error", "worst layer", "its error"):
        table.add_column(heading, justify="left" if heading in ("method", "levels", "zero", "worst layer") else "right")
    for row in rows:
        table.add_row(
            row["method"],
            row["levels"],
            row["zero"],
            f"{row['bits_per_parameter']:.3f}",
            f"{row['mse']:.2e}",
            f"{row['relative_error']:.4f}",
            row["worst_layer"],
            f"{row['worst_relative_error']:.4f}",
        )
    Console(width=None if Console().is_terminal else 160).print(table)

"""The report as a picture: error against bits, one line for each way to quantize."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lowrank.matplotlib_backend  # noqa: F401 # pyright: ignore[reportUnusedImport] (first: how it imports matplotlib counts)

# isort: split

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write a PNG to `path`. Both axes say what the table says; the error is logarithmic."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, chosen in (
        ("int, symmetric", lambda name: name.startswith("int") and name.endswith(" symmetric")),
        ("int, asymmetric", lambda name: name.endswith("asymmetric")),
        ("HQQ", lambda name: name.startswith("hqq")),
    ):
        line = sorted((row["bits_per_parameter"], row["relative_error"]) for row in rows if chosen(str(row["method"])))
        axes.plot(*zip(*line), marker="o", label=label)
    for row in rows:
        if row["method"] in ("nf4 double", "fp4 double", "int8 per row"):
            axes.plot(row["bits_per_parameter"], row["relative_error"], "*", markersize=11, label=row["method"])
    axes.set(xlabel="bits per parameter, with scales", ylabel="relative error of the weights", title=title)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=150)

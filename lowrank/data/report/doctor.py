"""The data doctor: what happens to the data, as a person reads it on a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lowrank.data.report.statistics import DataReport, Lengths

__all__ = ["DataReport", "render_report"]

_BAR_WIDTH = 40
_LONGEST_SHOWN = 2000
LEARNED, CONTEXT = "bold green", "dim"


def render_report(report: DataReport, *, marks: bool = False) -> RenderableType:
    """Counts, what is lost, what is odd, lengths, and samples colored by what carries loss.

    `marks` puts what carries loss between ⟦ and ⟧ as well, for terminals without colors.
    """
    parts: list[RenderableType] = [_headline(report), _datasets(report), *_remarks(report)]
    if report.lengths:
        parts += [Text(), _describe_lengths(report, report.lengths), Padding(_bars(report.lengths), (0, 2))]
    return Group(*parts, *_samples(report, marks))


def _headline(report: DataReport) -> Text:
    held_out = f", {report.eval_samples:,} held out" if report.eval_samples else ""
    return Text(f"{report.train_samples:,} samples to train on{held_out}", style="bold")


def _datasets(report: DataReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("dataset", "used for", "format"):
        table.add_column(heading, overflow="fold")
    for heading in ("rows read", "used", "left out", "cut", "repeated"):
        table.add_column(heading, justify="right")
    for dataset in report.datasets:
        left_out = dataset.read - dataset.used
        cut = dataset.truncated.count if dataset.truncated else 0
        repeated = dataset.duplicates.count if dataset.duplicates else 0
        table.add_row(
            Path(dataset.path).name if Path(dataset.path).suffix else dataset.title,
            dataset.use,
            dataset.format,
            f"{dataset.read:,}",
            f"{dataset.used:,}",
            Text(f"{left_out:,}", style="red" if left_out else ""),
            Text(f"{cut:,}", style="red" if cut else ""),
            Text(f"{repeated:,}", style="yellow" if repeated else ""),
        )
    return table


def _remarks(report: DataReport) -> list[RenderableType]:
    losses = report.losses
    lines = [Text(f"  lost  {loss}", style="red") for loss in losses]
    lines += [Text(f"  odd   {text}", style="yellow") for text in report.warnings[len(losses) :]]
    lines += [Text(f"  note  {text}") for text in report.information]
    return [Text(), *(lines or [Text("  nothing is lost, nothing is odd", style="green")])]


def _describe_lengths(report: DataReport, lengths: Lengths) -> Text:
    half, most = lengths.percentiles[50], lengths.percentiles[95]
    return Text(
        f"Half of the samples have up to {half:,} {report.unit}, 95 of 100 up to {most:,}, the longest "
        f"{lengths.longest:,}. {report.learned_share:.1%} of all {report.train_tokens:,} {report.unit} carry loss."
    )


def _bars(lengths: Lengths) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    most = max(count for _, _, count in lengths.histogram)
    for low, high, count in lengths.histogram:
        bar = "█" * max(count > 0, round(_BAR_WIDTH * count / most))
        table.add_row(f"{low:,}-{high:,}", f"{count:,}", Text(bar, style="cyan"))
    return table


def _samples(report: DataReport, marks: bool) -> list[RenderableType]:
    if not report.shown:
        return []
    legend = Text.assemble("Samples as the model sees them: ", ("learned", LEARNED), ", ", ("context", CONTEXT), ".")
    if report.pairs_shown:
        about = ". The chosen answer is trained towards, the rejected one is what is trained against."
        legend = Text.assemble(
            "Pairs as the model sees them: ", ("answers", LEARNED), ", ", ("context", CONTEXT), about
        )
    panels = [
        Panel(_colored(sample, marks), title=_title(number, report.pairs_shown), title_align="left", border_style="dim")
        for number, sample in enumerate(report.shown)
    ]
    return [Text(), legend, *panels]


def _title(number: int, pairs: bool) -> str:
    """Of the sample at this place, from 0; of pairs two are one."""
    return f"pair {number // 2 + 1}: {('chosen', 'rejected')[number % 2]}" if pairs else f"sample {number + 1}"


def _colored(sample: tuple[tuple[str, float], ...], marks: bool) -> Text:
    text = Text()
    for piece, weight in sample:
        shown = f"⟦{piece}⟧" if marks and weight else piece
        text.append(shown, style=LEARNED if weight else CONTEXT)
    if len(text) > _LONGEST_SHOWN:
        more = len(text) - _LONGEST_SHOWN
        text = Text.assemble(text[:_LONGEST_SHOWN], (f" ... ({more:,} characters more)", "italic"))
    return text

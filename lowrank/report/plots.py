"""`loss.png`: the curves of all jobs, as they were and smoothed, with held-out losses and the best of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lowrank.matplotlib_backend  # noqa: F401 # pyright: ignore[reportUnusedImport] (first: how it imports matplotlib counts)

# isort: split

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D

from lowrank.checkpoints.atomic import new_file
from lowrank.report.curve import smooth
from lowrank.report.reporters.metrics import read_metrics

LATIN = "DejaVu Sans"
"""Comes with matplotlib."""
CJK = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "Arial Unicode MS",
)
"""Fonts with Chinese characters, the nicest first."""
RED = "#c1272d"


@dataclass
class _Drawn:
    """What is drawn of one job: `(step, loss)` points, and steps that were skipped or gave no finite loss."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    metric: str = ""
    """Of the scores: what decides which evaluation is the best; without scores the loss does."""
    best: int | None = None
    """The step of the best evaluation, where the lines say it."""
    skipped: list[int] = field(default_factory=list)


def write_loss_plot(metrics: Path | Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw a metrics.jsonl, or lines like its own, to a PNG; an older one is replaced only by a whole one.

    One job: one panel. Several: training losses left, held-out losses right if there are any. Axes are
    linear; what lies far above the smooth curves is cut off and said to be. Fonts are what is installed:
    characters that none of them has are drawn as boxes, and such a job is known by its number.
    """
    jobs = _collect(read_metrics(metrics) if isinstance(metrics, Path) else metrics)
    figure = _draw(jobs, title)
    with new_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)


def _collect(lines: Iterable[Mapping[str, Any]]) -> dict[str, _Drawn]:
    jobs: dict[str, _Drawn] = {}
    for line in lines:
        if line.get("event") not in ("step", "eval"):
            continue
        job = jobs.setdefault(line["job"], _Drawn())
        finite = math.isfinite(line["loss"])
        if line["event"] == "eval":
            job.held_out += [(line["step"], line["loss"])] if finite else []
            job.best = line["step"] if finite and line.get("best") else job.best
            score = line.get("metrics", {}).get(line.get("metric"))
            if score is not None:
                job.metric = line["metric"]
                job.scores += [(line["step"], score)] if math.isfinite(score) else []
            continue
        job.train += [(line["step"], line["loss"])] if finite else []
        job.skipped += [line["step"]] if line.get("skipped") or not finite else []
    return jobs


def _draw(jobs: dict[str, _Drawn], title: str) -> Figure:
    """The whole picture."""
    with_held_out = any(job.held_out for job in jobs.values())
    two = len(jobs) > 1 and with_held_out
    scored = any(job.scores for job in jobs.values())
    num_panels = 1 + two + scored
    figure = Figure(figsize=((9, 13, 18)[num_panels - 1], 5.2 + 0.1 * max(0, len(jobs) - 12)), layout="constrained")
    FigureCanvasAgg(figure)
    letters = _Lettering()
    figure.suptitle(letters.drawable(title), fontproperties=letters.font(13), parse_math=False)
    panels = figure.subplots(1, num_panels, squeeze=False, sharex=True)[0]
    colors = _colors(len(jobs))
    handles = []
    for number, (name, job) in enumerate(jobs.items()):
        handles.append(_training(panels[0], job, colors[number], label=letters.label(name, number)))
        _held_out(panels[int(two)], job, colors[number], alone=len(jobs) == 1)
        if scored:
            _scores(panels[-1], job, colors[number])
    _mark_skipped(panels[0], jobs, colors)
    if len(jobs) > 1:
        panels[0].set_title("training loss", fontsize=11)
        if two:
            panels[1].set_title("held-out loss", fontsize=11)
    for panel in panels:
        _furnish(panel)
    if scored:
        names = dict.fromkeys(job.metric.replace("_", " ") for job in jobs.values() if job.metric)
        panels[-1].set_ylabel(f"{', '.join(names)} of held-out answers (%)")
    if len(jobs) == 1:
        _limit(panels[0], [job.train for job in jobs.values()], [job.held_out for job in jobs.values()])
    else:
        _limit(panels[0], [job.train for job in jobs.values()], [])
    handles = (handles if len(jobs) > 1 else []) + _key(jobs, alone=len(jobs) == 1)
    if handles:  # beside or below the panels, so that no curve hides behind it
        where, columns = ("outside right upper", 1) if len(jobs) > 1 else ("outside lower center", 4)
        figure.legend(handles=handles, prop=letters.font(9), frameon=False, loc=where, ncols=columns)
    if not any(job.train or job.held_out for job in jobs.values()):
        panels[0].text(0.5, 0.5, "no losses yet", transform=panels[0].transAxes, ha="center", color="gray")
    return figure


def _training(panel: Axes, job: _Drawn, color: Any, label: str) -> Line2D:
    steps, losses = _split(job.train)
    panel.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8, marker="." if len(steps) < 3 else None)
    return panel.plot(steps, smooth(losses), color=color, linewidth=1.8, label=label)[0]


def _held_out(panel: Axes, job: _Drawn, color: Any, alone: bool) -> None:
    if not job.held_out:
        return
    steps, losses = _split(job.held_out)
    color = "#d55e00" if alone else color
    panel.plot(steps, losses, color=color, linewidth=1.2, marker="o", markersize=3.5, linestyle="--" if alone else "-")
    best = steps.index(job.best) if job.scores and job.best in steps else int(np.argmin(losses))
    panel.plot(
        steps[best], losses[best], marker="*", markersize=14, color=color, markeredgecolor="black", markeredgewidth=0.7
    )
    if alone:
        panel.annotate(
            f"best {losses[best]:.4g} at step {steps[best]}",
            (steps[best], losses[best]),
            xytext=(0, 20),
            textcoords="offset points",
            ha="right" if steps[best] > 0.7 * max(steps) else "center",
            fontsize=9,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            zorder=5,
        )


def _scores(panel: Axes, job: _Drawn, color: Any) -> None:
    steps, scores = _split(job.scores)
    panel.plot(steps, scores, color=color, linewidth=1.2, marker="o", markersize=3.5)
    if job.best in steps:
        best = scores[steps.index(job.best)]
        panel.plot(job.best, best, marker="*", markersize=14, color=color, markeredgecolor="black", markeredgewidth=0.7)


def _mark_skipped(panel: Axes, jobs: dict[str, _Drawn], colors: Sequence[Any]) -> None:
    for job, color in zip(jobs.values(), colors):
        if job.skipped:
            height = [0.015] * len(job.skipped)
            color = RED if len(jobs) == 1 else color
            panel.plot(
                job.skipped,
                height,
                "x",
                color=color,
                markersize=6,
                transform=panel.get_xaxis_transform(),
                clip_on=False,
            )


def _key(jobs: dict[str, _Drawn], alone: bool) -> list[Line2D]:
    """What the marks mean."""
    gray, held = "#777777", "#d55e00"
    color = _colors(1)[0] if alone else gray
    handles = []
    if any(job.train for job in jobs.values()):
        handles.append(Line2D([], [], color=color, alpha=0.35, linewidth=0.9, label="as logged"))
        handles.append(Line2D([], [], color=color, linewidth=1.8, label="smoothed"))
    if any(job.held_out for job in jobs.values()):
        color, style = (held, "--") if alone else (gray, "-")
        handles.append(Line2D([], [], color=color, linestyle=style, marker="o", markersize=3.5, label="held-out"))
        if not alone:
            handles.append(_star(gray))
    if any(job.skipped for job in jobs.values()):
        label = "skipped or not finite"
        handles.append(Line2D([], [], color=RED if alone else gray, marker="x", linestyle="", label=label))
    return handles


def _star(color: str) -> Line2D:
    return Line2D(
        [],
        [],
        color=color,
        linestyle="",
        marker="*",
        markersize=11,
        markeredgecolor="black",
        markeredgewidth=0.7,
        label="best held-out",
    )


def _furnish(panel: Axes) -> None:
    panel.set_xlabel("optimizer step")
    panel.set_ylabel("loss (nats per token)")
    panel.grid(True, color="#e6e6e6", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.02)
    panel.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[attr-defined]  # MaxNLocator of linear axes


def _limit(panel: Axes, curves: Sequence[list[tuple[int, float]]], held_out: Sequence[list[tuple[int, float]]]) -> None:
    """Show the smooth curves and the bulk of the points; lone spikes do not squeeze the rest flat."""
    levels = [smooth(_split(curve)[1]) for curve in curves if curve] + [np.array(_split(p)[1]) for p in held_out if p]
    losses = [value for curve in curves for _, value in curve]
    if not levels or not losses:
        return
    level = np.concatenate(levels)
    low, high = min(level.min(), float(np.quantile(losses, 0.01))), max(level.max(), float(np.quantile(losses, 0.99)))
    middle = float(np.median(level))
    if high - middle > 12 * max(middle - low, 1e-12):  # a job exploded: keep the others readable
        high = max(float(np.quantile(level, 0.75)), middle + 3 * max(middle - low, 1e-12))
    margin = 0.06 * max(high - low, 1e-3 * abs(high), 1e-9)
    panel.set_ylim(low - margin, high + margin)
    if max(losses) > high + margin:
        panel.text(
            0.99,
            0.99,
            f"cut off: up to {max(losses):.3g}",
            transform=panel.transAxes,
            ha="right",
            va="top",
            fontsize=8,
            color="#777777",
        )


def _split(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]


def _colors(number: int) -> list[Any]:
    if number <= 10:
        return list(colormaps["tab10"](range(10)))[:number]
    return list(colormaps["turbo"](np.linspace(0.05, 0.95, number)))


class _Lettering:
    """Which fonts are there, and what they can draw."""

    def __init__(self) -> None:
        installed = {font.name for font in fontManager.ttflist}
        self.families = [LATIN, *[family for family in CJK if family in installed][:1]]
        self._characters: set[int] = set()
        for family in self.families:
            self._characters |= set(FT2Font(fontManager.findfont(family)).get_charmap())

    def font(self, size: int) -> FontProperties:
        """The first font that has a character draws it."""
        return FontProperties(family=self.families, size=size)

    def drawable(self, text: str) -> str:
        """The text with a box for every character that no font has."""
        return "".join(char if ord(char) in self._characters else "□" for char in text)

    def label(self, name: str, number: int) -> str:
        """Of a job; its number stands in front if boxes are all there is to tell it by."""
        text = self.drawable(name)
        text = text if text == name else f"{number + 1}: {text}"
        return f" {text}" if text.startswith("_") else text  # matplotlib leaves out what begins with an underscore

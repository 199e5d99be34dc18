"""loss.png: what is in it, for any number of jobs and any name, without a warning (they are errors here)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import Image

from lowrank.report.event_lines import as_line
from lowrank.report.plots import CJK, _collect, _draw, write_loss_plot
from lowrank.report.reporters.metrics import MetricsReporter
from tests.report.event_stream import loss_of, run_events


def lines(jobs: dict[str, int], **how: Any) -> list[dict[str, Any]]:
    return [as_line(event, step=0, time=0.0) for event in run_events(jobs, log_every=1, **how)]


def drawn(given: list[dict[str, Any]], title: str = "title") -> Figure:
    return _draw(_collect(given), title)


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def points(panel: Axes) -> list[tuple[list[float], list[float], Any]]:
    return [(list(line.get_xdata()), list(line.get_ydata()), line) for line in panel.get_lines()]  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [0, 1, 2, 7, 16])
@pytest.mark.parametrize("eval_every", [4, 1000])
def test_writes_a_picture(tmp_path: Path, number: int, eval_every: int) -> None:
    jobs = {f"job{index}": 30 + index for index in range(number)}
    given = lines(jobs, eval_every=eval_every) if jobs else []
    write_loss_plot(given, tmp_path / "loss.png", "runs/first")
    with Image.open(tmp_path / "loss.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.width >= 1000
        assert len(np.unique(np.asarray(image.convert("L")))) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_one_job_shows_both_curves_and_the_best_evaluation() -> None:
    (panel,) = drawn(lines({"a": 60})).axes
    raw, smooth, held_out, best = points(panel)
    assert raw[1] == [loss_of("a", step) for step in range(1, 61)]
    assert raw[2].get_alpha() < 0.5 < smooth[2].get_linewidth()
    assert np.std(np.diff(smooth[1], n=2)) < 0.1 * np.std(np.diff(raw[1], n=2))
    assert held_out[0] == list(range(4, 61, 4))
    lowest = min(held_out[1])
    assert (best[0], best[1]) == ([held_out[0][held_out[1].index(lowest)]], [lowest])
    assert panel.get_xscale() == panel.get_yscale() == "linear"
    assert f"at step {best[0][0]}" in panel.texts[0].get_text()


def test_several_jobs_have_two_panels_and_a_legend() -> None:
    figure = drawn(lines({"a": 30, "b": 20}))
    train, held_out = figure.axes
    assert [panel.get_title() for panel in figure.axes] == ["training loss", "held-out loss"]
    assert {line.get_label() for line in train.get_lines()} >= {"a", "b"}
    assert legend_of(figure)[:2] == ["a", "b"]
    assert len(points(held_out)) == 4  # a curve and a star each
    assert len(drawn(lines({"a": 30, "b": 20}, eval_every=1000)[:40]).axes) == 1  # nothing held out yet


def test_skipped_steps_are_marked() -> None:
    figure = drawn(lines({"a": 30}, not_finite=(("a", 7), ("a", 8))))
    marks = [each for each in points(figure.axes[0]) if each[2].get_marker() == "x"]
    assert [each[0] for each in marks] == [[7, 8]]
    assert "skipped or not finite" in legend_of(figure)
    assert "skipped or not finite" not in legend_of(drawn(lines({"a": 30})))


def test_zero_is_drawn_like_any_loss() -> None:
    given = [{"event": "step", "job": "a", "step": step, "loss": 0.0} for step in range(1, 5)]
    assert points(drawn(given).axes[0])[0][1] == [0.0] * 4


@pytest.mark.parametrize("losses", [[math.nan] * 5, [1.0], [1.0, math.inf], [1e30, 1.0, 1.0, 1.0], [-1.0, -2.0, -3.0]])
def test_odd_curves(tmp_path: Path, losses: list[float]) -> None:
    given = [{"event": "step", "job": "a", "step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    write_loss_plot(given, tmp_path / "loss.png", "odd")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_an_exploding_job_leaves_the_others_readable() -> None:
    given = lines({"good": 100}, eval_every=1000)
    given += [{"event": "step", "job": "bad", "step": step, "loss": 2.0 + (step > 90) * 1e6} for step in range(1, 101)]
    (panel, *_) = drawn(given).axes
    assert panel.get_ylim()[1] < 100
    assert any("cut off" in text.get_text() for text in panel.texts)


def test_names_nobody_can_draw_are_known_by_number(tmp_path: Path) -> None:
    given = lines({"_private": 5, "\ue000-r8": 5})  # a character of the private use area
    assert legend_of(drawn(given))[:2] == [" _private", "2: □-r8"]
    write_loss_plot(given, tmp_path / "loss.png", "50 % \ue000 $x_1$ \\frac")


def test_an_installed_chinese_font_is_used(tmp_path: Path) -> None:
    family = next(name for name in CJK if name not in {font.name for font in fontManager.ttflist})
    path = tmp_path / "chinese.ttf"
    write_font(path, family, "微调中文")
    before = list(fontManager.ttflist)
    fontManager.addfont(path)
    fontManager.ttflist.insert(0, fontManager.ttflist.pop())
    try:
        given = lines({"微调": 5, "中文-r8": 5})
        figure = drawn(given, "中文")
        assert legend_of(figure)[:2] == ["微调", "中文-r8"]
        write_loss_plot(given, tmp_path / "loss.png", "微调")  # a glyph that is missing would warn
    finally:
        fontManager.ttflist[:] = before


def write_font(path: Path, family: str, characters: str) -> None:
    """A font that draws a square for each of the characters."""
    pen = TTGlyphPen(None)
    for index, place in enumerate([(0, 0), (0, 700), (700, 700), (700, 0)]):
        (pen.moveTo if index == 0 else pen.lineTo)(place)
    pen.closePath()
    square = pen.glyph()
    names = [".notdef", *(f"uni{ord(char):04X}" for char in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(char): f"uni{ord(char):04X}" for char in characters})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (800, 50)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(path)


def test_reads_the_metrics_file_and_replaces_the_old_picture(tmp_path: Path) -> None:
    reporter = MetricsReporter(tmp_path)
    for event in run_events({"a": 20}, not_finite=(("a", 6),)):
        reporter.report(event)
    reporter.close()
    (tmp_path / "loss.png").write_bytes(b"old")
    write_loss_plot(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "t")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loss.png").write_bytes(b"old")
    with pytest.raises(KeyError):
        write_loss_plot([{"event": "step", "job": "a"}], tmp_path / "loss.png", "t")

    def full(self: Figure, path: Path, **how: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="no space"):
        write_loss_plot([], tmp_path / "loss.png", "t")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"loss.png": b"old"}

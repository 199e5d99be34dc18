"""Who listens to a run: a view for people or programs, the metrics file, and experiment trackers (trackers/)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from lowrank.report.events import Reporter
from lowrank.report.reporters.json_lines import JsonReporter
from lowrank.report.reporters.metrics import MetricsReporter
from lowrank.report.reporters.plain import PlainReporter
from lowrank.report.reporters.terminal import TerminalReporter
from lowrank.report.reporters.trackers import connect_trackers
from lowrank.terminal import Console


def recorders_for(output_dir: Path, report_to: Sequence[str] = ()) -> list[Reporter]:
    """metrics.jsonl and the trackers. Nothing is written, and no tracker's run begins, before `RunStarted`.

    ConfigError lists every tracker that is unknown, not installed, or cannot be used as it is set up.
    """
    return [MetricsReporter(output_dir), *connect_trackers(output_dir, report_to)]


def view_for(*, json: bool = False, quiet: bool = False, console: Console | None = None) -> Reporter:
    """What shows the run: JSON lines on standard output, only warnings (`quiet`) on standard error, a live view,
    or plain lines where nothing can be redrawn.
    """
    if json:
        return JsonReporter()
    console = console or Console(stderr=quiet)
    if isinstance(console.file, io.TextIOWrapper):
        console.file.reconfigure(errors="replace")  # a `?` for what an old code page lacks, not the end of the run
    if quiet:
        return PlainReporter(console, quiet=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return TerminalReporter(console)
    return PlainReporter(console)

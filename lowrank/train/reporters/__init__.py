"""Who listens to a run: a view for people or programs, the metrics file, and experiment trackers.

A tracker is a file of this folder with `connect(output_dir) -> Reporter`, which raises ImportError without its
package; its name is the file's. A third party's is `my_module:MyReporter`, called with the run folder.
"""

from __future__ import annotations

import importlib
import io
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lowrank.errors import ConfigError, did_you_mean, raise_all
from lowrank.train.events import Reporter
from lowrank.train.reporters.json_lines import JsonReporter
from lowrank.train.reporters.metrics import MetricsReporter
from lowrank.train.reporters.plain import PlainReporter
from lowrank.train.reporters.terminal import TerminalReporter


def recorders_for(output_dir: Path, report_to: Sequence[str] = ()) -> list[Reporter]:
    """metrics.jsonl and the trackers. Nothing is written, and no tracker's run begins, before `RunStarted`.

    ConfigError lists every tracker that is unknown, not installed, or cannot be used as it is set up.
    """
    return [MetricsReporter(output_dir), *_trackers(output_dir, report_to)]


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


def known_trackers() -> list[str]:
    """What `report_to` may name, besides third parties'."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"{__name__}.{name}"), "connect")]


def _trackers(output_dir: Path, report_to: Sequence[str]) -> list[Reporter]:
    found, problems = [], []
    known = known_trackers()
    for name in dict.fromkeys(report_to):
        if ":" not in name and name not in known:
            problems.append(f"{name!r} is not known{did_you_mean(name, known)}")
            continue
        try:
            found.append(_connect(name, output_dir))
        except ImportError as error:
            way_out = "is it installed here?" if ":" in name else f"pip install 'lowrank[{name}]'"
            problems.append(f"{name} needs a package that is not installed ({error}): {way_out}")
        except Exception as error:  # whatever a tracker's own set-up objects to, before hours are spent training
            problems.append(f"{name} cannot be used: {error}")
    raise_all(ConfigError, "report_to:", problems)
    return found


def _connect(name: str, output_dir: Path) -> Reporter:
    module_name, _, attribute = name.partition(":")
    if attribute:
        return getattr(importlib.import_module(module_name), attribute)(output_dir)
    return importlib.import_module(f"{__name__}.{name}").connect(output_dir)

"""Experiment trackers: one file each, found by its name.

A file of this folder has `connect(output_dir) -> Reporter`, which raises ImportError without its package; `report_to`
calls it by the file's name, and the extra that brings the package has that name too. A third party's is
`my_module:MyReporter`, called with the run folder. docs/add-a-reporter.md
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from lowrank.errors import ConfigError, did_you_mean, raise_all
from lowrank.report.events import Reporter
from lowrank.third_party import load_code, names_code


def known_trackers() -> list[str]:
    """What `report_to` may name, besides third parties'. Imports none of them."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def connect_trackers(output_dir: Path, report_to: Sequence[str]) -> list[Reporter]:
    """Those that `report_to` names. ConfigError lists every one that is unknown, not installed, or cannot be used as it
    is set up."""
    found, problems = [], []
    known = known_trackers()
    for name in dict.fromkeys(report_to):
        if name not in known and not names_code(name):
            problems.append(f"{name!r} is not known{did_you_mean(name, known)}")
            continue
        try:
            found.append(_connect(name, output_dir))
        except ImportError as error:
            way_out = "is it installed here?" if names_code(name) else f"pip install 'lowrank-llm[{name}]'"
            problems.append(f"{name} needs a package that is not installed ({error}): {way_out}")
        except ConfigError as error:
            problems.append(str(error))
        except Exception as error:  # whatever a tracker's own set-up objects to, before hours are spent training
            problems.append(f"{name} cannot be used: {error}")
    raise_all(ConfigError, "report_to:", problems)
    return found


def _connect(name: str, output_dir: Path) -> Reporter:
    if names_code(name):
        made = load_code(name)(output_dir)
        if not callable(getattr(made, "report", None)):
            raise ConfigError(
                f"{name} gives a {type(made).__name__}, which has no method `report(event)`: docs/add-a-reporter.md"
            )
        return made
    return importlib.import_module(f"{__name__}.{name}").connect(output_dir)

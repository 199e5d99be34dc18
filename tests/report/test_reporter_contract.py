"""What every reporter has to do alike: a new file of lowrank/report/reporters is fed all of this.

A tracker is skipped only where its `connect` raises ImportError for a package that is not there, and then an extra of
pyproject.toml has to bring it. tests/report/test_reporter_example.py holds these tests to that.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import io
import pkgutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

import lowrank.report.reporters as reporters
import lowrank.report.reporters.trackers as trackers
from lowrank.config import RunConfig
from lowrank.errors import ConfigError
from lowrank.report.events import Event, JobFinished, JobStarted, Notice, Reporter, RunFinished, RunStarted
from lowrank.report.reporters.trackers import connect_trackers, known_trackers
from lowrank.report.summary import SummaryBuilder
from tests.report.event_stream import TWO, report_all, run_events

ROOT = Path(__file__).parents[2]


def _views() -> dict[str, type]:
    """The classes of the folder itself that receive events."""
    modules = [
        importlib.import_module(f"{reporters.__name__}.{each.name}")
        for each in pkgutil.iter_modules(reporters.__path__)
    ]
    classes = [each for module in modules for each in vars(module).values() if inspect.isclass(each)]
    own = [each for each in classes if each.__module__.startswith(reporters.__name__)]
    return {each.__name__: each for each in own if hasattr(each, "report") and hasattr(each, "close")}


VIEWS = _views()


def connected(name: str, output_dir: Path) -> Reporter:
    """A tracker by its name, or a view made with what its parameters are called by."""
    if name in VIEWS:
        there = {"output_dir": output_dir, "console": Console(file=io.StringIO()), "stream": io.StringIO()}
        wanted = inspect.signature(VIEWS[name]).parameters
        return VIEWS[name](**{key: value for key, value in there.items() if key in wanted})
    module = importlib.import_module(f"{trackers.__name__}.{name}")
    try:
        return module.connect(output_dir)
    except ImportError as error:
        missing = error
    package = (missing.name or "").partition(".")[0]
    assert package, f"{name}: an ImportError that names no module ({missing}) does not tell what is missing"
    assert importlib.util.find_spec(package) is None, f"{name} can run here, and does not: {missing}"
    pytest.skip(f"{package} is not installed")


def imported_by_connect(name: str) -> list[str]:
    """The modules that a tracker's `connect` imports, but for Python's own."""
    source = inspect.getsource(importlib.import_module(f"{trackers.__name__}.{name}").connect)
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return [each for each in found if each.partition(".")[0] not in (sys.stdlib_module_names | {"lowrank"})]


@pytest.fixture(params=[*known_trackers(), *VIEWS])
def named(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.chdir(tmp_path)
    for key, value in {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    return request.param


def test_there_are_reporters() -> None:
    assert len(VIEWS) >= 5
    assert len(known_trackers()) >= 4


def test_a_whole_run_and_its_resume_are_heard(named: str, tmp_path: Path) -> None:
    """Two jobs, evaluations, a step whose loss is not finite, notices; broken off, and gone on with."""
    run = tmp_path / "run"
    report_all(run_events(TWO, run, until=11, not_finite=(("a", 3),)), connected(named, run))
    reporter, summary = connected(named, run), SummaryBuilder(run)
    report_all(run_events(TWO, run, first=7), summary)
    report_all([*run_events(TWO, run, first=7), RunFinished(summary.as_dict())], reporter)


def test_nothing_is_there_before_the_run_begins(named: str, tmp_path: Path) -> None:
    """A run that is refused leaves nothing behind, so a reporter waits for `RunStarted`."""
    before = {path for path in tmp_path.rglob("*") if path.is_relative_to(tmp_path / "run")}
    reporter = connected(named, tmp_path / "run")
    reporter.report(Notice("2 rows dropped", "warning", None))
    reporter.close()
    assert {path for path in tmp_path.rglob("*") if path.is_relative_to(tmp_path / "run")} == before


def test_hostile_names_and_texts_are_borne(named: str, tmp_path: Path) -> None:
    """Names of jobs and notices come from files: markup, control characters, half a surrogate pair."""
    text = "[red]x[/] \x1b[31m\udc80 <b>&amp; %s {} \n"
    job = JobStarted("a", 2, 0, 1.0, 10, text)
    events: list[Event] = [RunStarted(tmp_path / "run", (job,), {"jobs": [{"name": "a"}]}, "cpu", "float32")]
    events += [Notice(text, "warning", "a"), Notice(text, "info", None), JobFinished("a", 0, text)]
    report_all(events, connected(named, tmp_path / "run"))


@pytest.mark.parametrize("name", known_trackers())
def test_a_tracker_s_package_is_an_extra(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And where it is missing, this is said before a run begins. What needs no package needs no extra."""
    extras = (ROOT / "pyproject.toml").read_text("utf-8").partition("[project.optional-dependencies]")[2]
    packages = imported_by_connect(name)
    assert (f"\n{name} = " in extras.partition("\n[")[0]) == bool(packages), packages
    if not packages:
        return
    for package in packages:  # as if not installed
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"pip install 'lowrank-llm\[{name}\]'"):
        connect_trackers(tmp_path, [name])


def test_the_settings_name_them_all() -> None:
    text = str(RunConfig.model_fields["report_to"].description)
    listed = text.partition(": ")[2].partition(", or a reporter")[0].split(", ")
    assert sorted(listed) == known_trackers()

"""`--cpu-durations=N`: the tests that took the most processor time, child processes included, and the folders' sums.

Wall time says little on a machine that does other work too; this says what a test costs.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest

from tests import command_line

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PROPERTY = "processor_seconds"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-durations", type=int, default=None, metavar="N",
        help="processor seconds, children included: each folder's sum, each file's, and the N dearest tests (Linux)",
    )  # fmt: skip


class ProcessorTime:
    """Measures in each worker, and reports where the workers' reports come together."""

    def __init__(self, dearest: int) -> None:
        self.dearest = dearest
        self.seconds: dict[str, float] = {}
        self.last = _seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        now = _seconds()  # since the phase before, so that what lies between two phases counts too
        report.user_properties.append((f"{_PROPERTY}_{report.when}", now - self.last))
        self.last = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = dict(report.user_properties).get(f"{_PROPERTY}_{report.when}")
        if isinstance(found, float):
            self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + found

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        for title, depth in (("folder", 2), ("file", None)):
            sums: defaultdict[str, list[float]] = defaultdict(list)
            for test, seconds in self.seconds.items():
                file = test.split("::")[0]
                sums["/".join(file.split("/")[:depth]) if depth else file].append(seconds)
            terminalreporter.section(f"processor seconds by {title}")
            for name, each in sorted(sums.items(), key=lambda item: -sum(item[1])):
                write(f"{sum(each):9.2f}s  {len(each):5d} tests  {name}")
        terminalreporter.section(f"the {self.dearest} dearest tests, in processor seconds")
        for test, seconds in sorted(self.seconds.items(), key=lambda item: -item[1])[: self.dearest]:
            write(f"{seconds:9.2f}s  {test}")
        write(f"{sum(self.seconds.values()):9.2f}s  in all")


def pytest_configure(config: pytest.Config) -> None:
    dearest = config.getoption("--cpu-durations")
    if dearest is not None:
        config.pluginmanager.register(ProcessorTime(dearest), "processor-time")


def _seconds() -> float:
    """Processor seconds of this process, of the children that have ended, and of the command lines' parent."""
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system + _of_command_lines()


def _of_command_lines() -> float:
    """Of the process that forks the command lines, which lives as long as this one, and of its children."""
    process = command_line.running()
    if process is None:
        return 0.0
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no Linux
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS

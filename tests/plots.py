"""Runs in tests draw no loss.png: a picture takes as long as the few steps of a tiny model.

The modules named below draw, and so do the programs that tests start themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lowrank.report.summary import SummaryBuilder

DRAWING = ("tests.cli.test_demo", "tests.report", "tests.test_file_modes", "tests.train.test_stop_signal")
"""Test modules, or packages of them, whose runs draw."""
DRAWS = "LOWRANK_TESTS_DRAW"
"""The environment variable that says so to the processes they fork (tests/command_line.py)."""


@pytest.fixture(autouse=True, scope="module")
def _plots(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.startswith(DRAWING):
            patch.setenv(DRAWS, "1")
        else:
            draw_nothing(patch)
        yield


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """From now on runs of this process leave their picture out."""
    patch.setattr(SummaryBuilder, "_draw", lambda _: None)


def draw_if_requested() -> None:
    """In a process that runs one command."""
    if DRAWS not in os.environ:
        draw_nothing(pytest.MonkeyPatch())

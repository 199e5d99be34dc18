"""What browser tests share: one browser for all of a worker's, and one board for each file's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.board.browser import opened
from tests.board.forked import forked_children
from tests.board.running import Running, board_on


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """Chromium; each page has a context of its own. Not for the whole session: its event loop runs as long as it does,
    and other tests have their own."""
    with opened() as found:
        yield found


@pytest.fixture(scope="module")
def forked() -> Iterator[None]:
    """What the boards of a file start is forked."""
    with forked_children():
        yield


@pytest.fixture(scope="module")
def shared(forked: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A board for all tests of a file."""
    with board_on(tmp_path_factory.mktemp("board")) as board:
        yield board

"""Conversations about pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.picture_rows import real_or_made


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_or_made(request, tmp_path_factory.mktemp("rows"))

"""llama.cpp's own converter, for the slow tests that run it."""

from __future__ import annotations

import pytest

from lowrank.errors import ModelError
from lowrank.export.gguf.upstream import Upstream, fetch


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    """Fetched once for these tests, as a user's is."""
    folder = tmp_path_factory.mktemp("converter") / "it"
    try:
        fetch(folder)
    except ModelError as error:
        pytest.skip(str(error))
    return Upstream(folder)

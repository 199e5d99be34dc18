"""What tests of memory begin with."""

from __future__ import annotations

import pytest

from lowrank.kernels import scratch


@pytest.fixture(autouse=True)
def no_scratch_memory() -> None:
    """A buffer that an earlier test of this process has left larger than these models need would count as theirs."""
    scratch._buffers.by_kind.clear()

"""Collected by `make rehearse` alone: it needs a CUDA build of torch and `no_device.c` before torch is loaded."""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = [] if os.environ.get("LOWRANK_REHEARSAL") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _pretended_device() -> None:
    from tests.rehearsal.fake_gpu import pretend

    pretend()

"""Telling the allocator to keep what was freed: it does what it says, and nothing else changes."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from lowrank.kernels.host_memory import keep_freed_memory


def test_harmless_to_call_twice_and_freed_blocks_are_used_again() -> None:
    """In a process of its own, since the setting is the process's. 100 blocks in turn cost the memory of one or two."""
    code = """
import psutil, torch
from lowrank.kernels.host_memory import keep_freed_memory
assert keep_freed_memory() == keep_freed_memory()
torch.ones(16 << 20).sum()
before = psutil.Process().memory_info().rss
for size in range(100):
    assert torch.ones((8 << 20) + 4096 * size).sum() > 0
print((psutil.Process().memory_info().rss - before) >> 20)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 200  # MiB; the blocks are 32 each


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False

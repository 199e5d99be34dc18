"""Telling the allocator to keep what was freed: it does what it says, and nothing else changes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import pytest

from lowrank.kernels.glibc_malloc import keep_freed_memory, start_again_without_cache

TAKE_AND_FREE = """
import resource, torch
from lowrank.kernels.glibc_malloc import keep_freed_memory

def fresh_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in range(100):
        assert torch.ones((8 << 20) + 4096 * size).sum() > 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = fresh_pages()
assert keep_freed_memory() == keep_freed_memory()
print(usual, fresh_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's")
def test_harmless_to_call_twice_and_freed_blocks_are_used_again() -> None:
    """In a process of its own, since the setting is the process's. 100 blocks of 32 MiB in turn take the pages of one
    to six, by how the heap lies, where they took those of a hundred."""
    done = subprocess.run([sys.executable, "-c", TAKE_AND_FREE], capture_output=True, text=True, check=True)
    usual, kept = map(int, done.stdout.split())
    assert kept < usual / 4


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


GROW = """
import psutil, torch
from lowrank.kernels.glibc_malloc import keep_freed_memory, start_again_without_cache
start_again_without_cache()
keep_freed_memory()
weight, kept = torch.ones(2, requires_grad=True), []
before = psutil.Process().memory_info().rss
blocks = [torch.ones(1 << 18) for _ in range(40)]
for turn in range(200):
    for place in range(turn % 2, 40, 2):
        blocks[place] = None
    kept += [(weight * 2).view(1, 2).t() for _ in range(30)]  # a few bytes here and there, as an autograd graph takes
    for place in range(turn % 2, 40, 2):
        blocks[place] = torch.ones(1 << 18)
print((psutil.Process().memory_info().rss - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's")
def test_without_the_cache_a_freed_block_is_as_good_as_new() -> None:
    """40 MiB are alive at any time, of blocks of 1 MiB. With the cache the process grows by 480 to 1,430 MiB in these
    turns, by luck; without it by 65 to 370, and seldom more (torch 2.11 and 2.13)."""
    grown = (
        int(subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    )
    assert any(grown_mib < 350 for grown_mib in grown)


def test_starting_again_keeps_the_command_and_happens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[tuple[Any, ...]] = []
    monkeypatch.setattr(os, "execve", lambda *call: requested.append(call))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "lowrank", "train", "run.yaml"])
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    start_again_without_cache()
    ((program, arguments, environment),) = requested
    assert (program, arguments[1:]) == (sys.executable, ["-m", "lowrank", "train", "run.yaml"])
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.tcache_count=0"
    monkeypatch.setenv("GLIBC_TUNABLES", environment["GLIBC_TUNABLES"])
    start_again_without_cache()
    assert len(requested) == 1
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    start_again_without_cache()
    assert len(requested) == 1

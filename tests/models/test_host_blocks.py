"""One copy of a streamed base in the memory of a machine, whoever of its ranks fetches from it."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.errors import ModelError
from lowrank.models.host_blocks import MachineBlocks
from lowrank.ranks import Ranks
from tests.train.rank_threads import on_ranks

linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memfd_create is Linux's")


def fill(block: torch.Tensor) -> None:
    block.copy_(torch.arange(len(block)).to(torch.uint8))


def two_blocks(machines: list[str], fills: Any = None) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    def work(ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor, int]:
        warnings: list[str] = []
        blocks = MachineBlocks(ranks, pin=False, warn=warnings.append, machine=machines[ranks.rank])
        own = fills[ranks.rank] if fills else fill
        first, second = blocks.block(5000, own), blocks.block(300, own)
        assert blocks.block(0, own).numel() == 0
        blocks.done()
        alone = machines.index(machines[ranks.rank]) == ranks.rank
        assert bool(warnings) == (not alone and not blocks.shared_bytes), "a copy that need not be is said"
        return first, second, blocks.shared_bytes

    return on_ranks(len(machines), work)


@linux
def test_the_ranks_of_a_machine_map_the_same_pages() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    (first, one, own), (other, second, shared), (third, two, also) = two_blocks(["a", "a", "a"])
    assert (own, shared, also) == (0, 5300, 5300)
    assert torch.equal(second, torch.arange(300).to(torch.uint8))
    first[7] = 99
    assert other[7] == third[7] == 99, "one copy"
    del first, second, other, third, one, two
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "no file stays open"


def test_machines_have_copies_of_their_own() -> None:
    (first, _, _), (second, _, shared), (third, _, _), _ = two_blocks(["a", "b", "a", "b"])
    assert torch.equal(first, second)
    first[7] = 99
    assert second[7] == 7
    if hasattr(os, "memfd_create"):
        assert third[7] == 99
        assert shared == 0, "the first of its machine"


def refused(*arguments: object) -> int:
    raise PermissionError("not in this container")


@pytest.mark.parametrize("make", [None, refused])
def test_where_nothing_can_be_shared_each_keeps_its_own(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    if make is None:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    else:
        monkeypatch.setattr(os, "memfd_create", make, raising=False)
    (first, _, _), (second, _, shared) = two_blocks(["a", "a"])
    assert torch.equal(first, second)
    assert shared == 0
    first[7] = 99
    assert second[7] == 7


@linux
def test_another_process_behind_the_same_number_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where two containers have a process 1 each."""
    monkeypatch.setattr(os, "readlink", lambda path: "/memfd:somebody's (deleted)")
    (first, _, _), (second, _, shared) = two_blocks(["a", "a"])
    assert (shared, bool(torch.equal(first, second))) == (0, True)


@linux
def test_ranks_that_packed_other_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="rank 1 has packed other weights than rank 0"):
        two_blocks(["a", "a"], [fill, lambda block: block.zero_()])

"""Where blocks of a streamed base lie in host memory: a process's own, or one that all ranks of a machine map.

Eight GPUs that are each streamed a 70B base in nf4 want 35 GB of host memory so, and not 282. A shared block is an
anonymous file of Linux (`memfd_create`), which the machine's first rank fills and the others open through /proc: no
size limit as /dev/shm has in containers, and nothing is left behind by a process that is killed. Where that cannot be
had (another system, containers that do not see one another's processes) a rank keeps a copy of its own.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from lowrank.errors import ModelError
from lowrank.ranks import Ranks

_PORTABLE = 1
"""cudaHostRegisterPortable."""
Fill = Callable[[torch.Tensor], None]
"""Writes the bytes of a block into a tensor (bytes)."""


class HostBlocks(Protocol):
    """Gives out host memory for the blocks of a base, one after the other, in the same order on all ranks."""

    def block(self, size: int, fill: Fill, compare: bool = True) -> torch.Tensor:
        """(size) bytes that hold what `fill` writes. They are never written to again. `compare`: ranks that share them
        make sure that they would have written the same; where all read the same file there is no need."""
        ...

    def done(self) -> None:
        """All blocks are there."""
        ...


class OwnBlocks:
    """Memory of this process, pinned where a GPU fetches from it."""

    def __init__(self, pin: bool) -> None:
        self._pin = pin

    def block(self, size: int, fill: Fill, compare: bool = True) -> torch.Tensor:
        """See HostBlocks."""
        del compare
        if not self._pin or not size:
            return _filled(size, fill)
        block = _map(-1, size)  # torch's own pinned memory comes in powers of two
        fill(block)
        return pinned(block)

    def done(self) -> None:
        """Nothing is left."""


class MachineBlocks:
    """Memory that the ranks of a machine share. Every call is made by all ranks, in the same order."""

    def __init__(self, ranks: Ranks, pin: bool, warn: Callable[[str], None], machine: str | None = None) -> None:
        """`warn` is told where this rank keeps a copy of its own. `machine`: what tells machines apart; None: this
        system's boot."""
        self._ranks, self._pin, self._warn, self._own = ranks, pin, warn, OwnBlocks(pin)
        machines = ranks.exchange(machine or _boot())
        self._first = machines.index(machines[ranks.rank])
        """The rank whose memory this one maps."""
        self._shares = machines.count(machines[self._first]) > 1
        self._open: int | None = None
        """A block that the others are about to map."""
        self.shared_bytes = self._own_bytes = 0
        """Of other ranks' memory, and of copies that might have been of theirs."""

    def block(self, size: int, fill: Fill, compare: bool = True) -> torch.Tensor:
        """See HostBlocks. ModelError where this rank has packed other bytes than the machine's first."""
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        token = f"lowrank-{secrets.token_hex(8)}"
        made = _made(token, size) if self._shares and self._ranks.rank == self._first else None
        if made is not None:
            fill(made[1])
        found = self._ranks.exchange(None if made is None else [os.getpid(), made[0], token])[self._first]
        self._close()  # whoever tells of this block has mapped the one before
        if made is not None:
            self._open, block = made
            return self._pinned(block)
        shared = self._mapped(found, size) if found and self._shares else None
        if shared is None:
            self._own_bytes += size * (self._ranks.rank != self._first)
            return self._own.block(size, fill)
        if compare and not torch.equal(_filled(size, fill), shared):
            raise ModelError(
                f"rank {self._ranks.rank} has packed other weights than rank {self._first} of the same machine; the "
                "files of the base have changed while it was read: start again"
            )
        self.shared_bytes += size
        return self._pinned(shared)

    def done(self) -> None:
        """See HostBlocks."""
        self._ranks.exchange(None)
        self._close()
        if self._own_bytes:
            self._warn(
                f"rank {self._ranks.rank} keeps a copy of the base of its own in host memory "
                f"({self._own_bytes / 1e9:.1f} GB): processes of one machine can share it on Linux only, and where "
                "they see one another under /proc"
            )

    def _close(self) -> None:
        """No rank will open the last block any more; who has mapped it keeps it."""
        if self._open is not None:
            os.close(self._open)
            self._open = None

    def _mapped(self, offered: Any, size: int) -> torch.Tensor | None:
        process, number, token = offered
        path = f"/proc/{process}/fd/{number}"
        try:
            if token not in os.readlink(path):  # another container's process of that number
                return None
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            return None
        try:
            return _map(descriptor, size)
        finally:
            os.close(descriptor)

    def _pinned(self, block: torch.Tensor) -> torch.Tensor:
        return pinned(block) if self._pin else block  # each process registers its own mapping of the same pages


def pinned(block: torch.Tensor) -> torch.Tensor:
    """The block, whose pages CUDA may fetch from as long as it lives. ModelError where it cannot pin them."""
    runtime: Any = torch.cuda.cudart()
    address = block.data_ptr()
    error = int(runtime.cudaHostRegister(address, block.numel(), _PORTABLE))
    if error:
        raise ModelError(
            f"base: streamed: CUDA cannot pin {block.numel() / 1e9:.2f} GB of host memory for a layer (error {error}); "
            "free some, or allow more locked memory (ulimit -l, docker run --ulimit memlock=-1)"
        )
    # or the next base, whose pages may lie there, could not be pinned
    weakref.finalize(block, runtime.cudaHostUnregister, address)
    return block


def _filled(size: int, fill: Fill) -> torch.Tensor:
    block = torch.empty(size, dtype=torch.uint8)
    fill(block)
    return block


def _made(token: str, size: int) -> tuple[int, torch.Tensor] | None:
    """An anonymous file of this name, and its bytes; None where the system has or allows none."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        descriptor = os.memfd_create(token)
    except OSError:
        return None
    try:
        os.ftruncate(descriptor, size)
        return descriptor, _map(descriptor, size)
    except OSError:
        os.close(descriptor)
        return None


def _map(descriptor: int, size: int) -> torch.Tensor:
    # writable everywhere, since torch wants it so; nobody writes but the one who fills it
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()

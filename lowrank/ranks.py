"""Ranks: the processes that train one run, and how they exchange values and sum gradients.

    Alone       one process
    Processes   ranks of torch.distributed, as torchrun, Ray Train or `devices=n` start them

JSON values go through the launcher's key-value store until there is a process group, which begins with the first step,
so that a rank that reads data for an hour makes no other wait at a barrier with a time limit. Gradients are summed in
place, as a binary tree in the order of the ranks: ((0 + 1) + (2 + 3)). NCCL and gloo guarantee no order for theirs;
with this one the sum has the same bits on any number of ranks that share the same terms (train/lanes.py).

Every exchange also carries whether a stop was requested, so that all ranks learn of it at the same exchange.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lowrank.errors import LowrankError, first_line

_PATIENCE_BEFORE = timedelta(days=2)
"""Time limit for ranks that read, plan and load; the launcher ends all when one fails."""
_PATIENCE = timedelta(hours=6)
"""Time limit for ranks that train: longer than any step, evaluation or save. A rank that fails is noticed at once."""
_REPORT_TIMEOUT = timedelta(seconds=10)
_ANSWERED_WITHIN = timedelta(seconds=3)
_MOST_AT_ONCE = 1 << 22
"""Numbers that are summed at once, 16 MB; longer tensors are summed in parts, in the same buffers."""


class RankLost(LowrankError):
    """Another rank of this run has ended or cannot be reached; that process's own error says why."""


class Ranks(Protocol):
    """The processes that train a run, seen from one of them. `stop_requested` is the same on all of them."""

    rank: int
    """The number of this process. 0 is the first, the only one that writes."""
    world: int
    stop_requested: bool
    wants_to_stop: Callable[[], bool]
    """Returns whether a stop was requested from this process; called at every exchange."""

    def exchange(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order; `value` is plain JSON. All ranks call it equally often."""
        ...

    def begin(self, device: torch.device) -> None:
        """Called before the first step, whose tensors are on `device`."""
        ...

    def add(self, flat_N: torch.Tensor) -> None:
        """Sum over all ranks in place, with the same bits on all of them."""
        ...


class Alone:
    """The only process of a run."""

    rank, world, stop_requested = 0, 1, False

    def __init__(self) -> None:
        self.wants_to_stop: Callable[[], bool] = lambda: False

    def exchange(self, value: Any) -> list[Any]:
        """See Ranks."""
        return [value]

    def begin(self, device: torch.device) -> None:
        """See Ranks. Nothing to do."""

    def add(self, flat_N: torch.Tensor) -> None:
        """See Ranks. It is the sum already."""


ALONE = Alone()


def agree(ranks: Ranks, value: Callable[[], Any]) -> Any:
    """Return what `value` returns on rank 0, on all ranks; others do not call it."""
    return ranks.exchange(value() if ranks.rank == 0 else None)[0]


class Processes:
    """Ranks of torch.distributed."""

    def __init__(self) -> None:
        """Join by the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or use an existing process group."""
        self.stop_requested = False
        self.wants_to_stop: Callable[[], bool] = lambda: False
        self._exchanges = 0
        self._store: Any = None
        self._host: Any = None
        """A gloo group for `exchange`, beside the one for tensors."""
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            self._host = dist.new_group(backend="gloo", timeout=_PATIENCE)
            return
        with _explain_lost_process():
            store, self.rank, self.world = next(rendezvous("env://", timeout=_PATIENCE_BEFORE))
        store.set_timeout(_PATIENCE_BEFORE)
        self._store = _with_prefix("lowrank", store)

    def begin(self, device: torch.device) -> None:
        """See Ranks. Makes the process group."""
        if self._host is not None:
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with _explain_lost_process():
            dist.init_process_group(
                backend,
                store=_with_prefix("group", self._store),
                rank=self.rank,
                world_size=self.world,
                timeout=_PATIENCE,
                device_id=device if device.type == "cuda" else None,
            )
            self._host = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def end(self) -> None:
        """Destroy the process group that `begin` has made."""
        if self._store is not None and self._host is not None:
            dist.destroy_process_group()
            self._host = None

    def exchange(self, value: Any) -> list[Any]:
        """See Ranks."""
        text = json.dumps([self.wants_to_stop(), value]).encode()
        with _explain_lost_process():
            texts = self._by_store(text) if self._host is None else self._by_group(text)
        received = [json.loads(each) for each in texts]
        self.stop_requested = self.stop_requested or any(requested for requested, _ in received)
        return [each for _, each in received]

    def _by_store(self, text: bytes) -> list[bytes]:
        self._exchanges += 1
        self._store.set(f"exchange/{self._exchanges}/{self.rank}", text.decode())
        return [self._store.get(f"exchange/{self._exchanges}/{rank}") for rank in range(self.world)]

    def _by_group(self, text: bytes) -> list[bytes]:
        length = torch.tensor([len(text)])
        lengths = [torch.zeros_like(length) for _ in range(self.world)]
        dist.all_gather(lengths, length, group=self._host)
        longest = max(int(each) for each in lengths)
        padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
        texts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(texts, padded, group=self._host)
        return [each[: int(length)].numpy().tobytes() for each, length in zip(texts, lengths)]

    def add(self, flat_N: torch.Tensor) -> None:
        """See Ranks. Each rank sums one part (reduce-scatter, all-gather), so each sends twice the numbers, whatever
        the number of ranks."""
        with _explain_lost_process():
            for part_N in flat_N.split(_MOST_AT_ONCE):
                self._add(part_N)

    def _add(self, part_N: torch.Tensor) -> None:
        chunk = -(-len(part_N) // self.world)
        given = part_N
        if len(part_N) != chunk * self.world:
            given = torch.cat([part_N, part_N.new_zeros(chunk * self.world - len(part_N))])
        taken = torch.empty_like(given)
        group = self._host if part_N.device.type == "cpu" else None  # a group that was there may know GPUs alone
        dist.all_to_all_single(taken, given, group=group)
        own_N = by_halves(list(taken.split(chunk)))
        dist.all_gather(list(given.split(chunk)), own_N, group=group)
        if given is not part_N:
            part_N.copy_(given[: len(part_N)])

    def reported_by_first(self, error: LowrankError) -> bool:
        """Return whether rank 0 reports the same error, so that this rank need not. Called by every rank that ends by
        an error before training."""
        if self._store is None or self._host is not None:
            return False
        try:
            if self.rank == 0:
                self._store.set("error", str(error))
                # the store may be this process's own, and ends with it
                self._store.wait([f"read/{rank}" for rank in range(1, self.world)], _ANSWERED_WITHIN)
                return False
            self._store.wait(["error"], _REPORT_TIMEOUT)
            first_error = self._store.get("error").decode()
            self._store.set(f"read/{self.rank}", "")
            return first_error == str(error)
        except (RuntimeError, OSError):  # it has ended, or has no error
            return False


def by_halves(terms: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of a power of two of tensors, added as a binary tree, so that ranks and lanes are summed alike.
    The tensors are overwritten."""
    while len(terms) > 1:
        terms = [one.add_(other) for one, other in zip(terms[::2], terms[1::2])]
    return terms[0]


def processes_here(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks of this process's run, by a launcher's environment or an existing process group; 1 if
    it is alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    given = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(environment.get(name) for name in given) or not environment["WORLD_SIZE"].isdecimal():
        return 1
    return int(environment["WORLD_SIZE"])


def ranks_of_a_machine(world: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return how many of `world` ranks are on this machine, by LOCAL_WORLD_SIZE; all if it is not set."""
    local = environment.get("LOCAL_WORLD_SIZE", "")
    return int(local) if local.isdecimal() and int(local) and world % int(local) == 0 else world


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is rank 0, which alone writes and reports."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return processes_here(environment) == 1 or environment["RANK"] == "0"


def _with_prefix(name: str, store: Any) -> Any:
    """Return the store with a prefix for its keys."""
    return dist.PrefixStore(name, store)  # pyright: ignore[reportPrivateImportUsage] (torch documents it there)


@contextmanager
def _explain_lost_process() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:  # whatever torch's back-ends make of a closed connection
        raise RankLost(
            "another process of this run has ended or cannot be reached; see that process's own error "
            f"({first_line(error)})"
        ) from error

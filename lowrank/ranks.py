"""One process, or several that train one run together: what they tell one another.

    Alone       one process: agrees with itself
    Processes   ranks of torch.distributed, as torchrun, Ray Train or `devices=n` start them

What is told as JSON goes through the launcher's key-value store until there is a process group, which begins with the
first step: a rank that reads data for an hour keeps nobody waiting at a barrier that ends in a time limit. Gradients
are summed where they are, in the order of the ranks, by halves: ((0 + 1) + (2 + 3)). A ring's order is not promised by
anybody; this one is, so the sum has the same bits on any number of ranks that share the same terms (train/lanes.py).

One thing travels with everything that is told: whether somebody has asked a rank to stop. So all know it at once.
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
"""For ranks that read, plan and load; whoever has started them ends all when one dies."""
_PATIENCE = timedelta(hours=6)
"""For ranks that train: longer than any step, evaluation or save. A rank that dies is noticed at once."""
_REPORT_TIMEOUT = timedelta(seconds=10)
_ANSWERED_WITHIN = timedelta(seconds=3)
_MOST_AT_ONCE = 1 << 22
"""Numbers of one sum, 16 MB; what is longer is summed in pieces, in the same buffers."""


class RankLost(LowrankError):
    """Another rank of this run has ended or cannot be reached; that process's own error says why."""


class Ranks(Protocol):
    """What a run knows of the processes that train it. `stop_requested` is the same on all of them."""

    rank: int
    """0 is the first, which alone writes."""
    world: int
    stop_requested: bool
    wants_to_stop: Callable[[], bool]
    """Whether this one was asked to stop; looked at whenever something is told."""

    def exchange(self, value: Any) -> list[Any]:
        """Plain JSON of every rank, by rank. All call it the same number of times."""
        ...

    def begin(self, device: torch.device) -> None:
        """All is ready for steps, whose tensors are on `device`."""
        ...

    def add(self, flat_N: torch.Tensor) -> None:
        """Put the sum over all ranks in the place of every rank's own, with the same bits everywhere."""
        ...


class Alone:
    """One process."""

    rank, world, stop_requested = 0, 1, False

    def __init__(self) -> None:
        self.wants_to_stop: Callable[[], bool] = lambda: False

    def exchange(self, value: Any) -> list[Any]:
        """Its own."""
        return [value]

    def begin(self, device: torch.device) -> None:
        """Nobody has to be waited for."""

    def add(self, flat_N: torch.Tensor) -> None:
        """It is the sum."""


ALONE = Alone()


def agree(ranks: Ranks, value: Callable[[], Any]) -> Any:
    """What rank 0 finds `value` to be; the others do not look."""
    return ranks.exchange(value() if ranks.rank == 0 else None)[0]


class Processes:
    """Ranks of torch.distributed."""

    def __init__(self) -> None:
        """By the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or the process group that is there."""
        self.stop_requested = False
        self.wants_to_stop: Callable[[], bool] = lambda: False
        self._exchanges = 0
        self._store: Any = None
        self._host: Any = None
        """A group for what is told, beside that for tensors."""
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            self._host = dist.new_group(backend="gloo", timeout=_PATIENCE)
            return
        with _explain_lost_process():
            store, self.rank, self.world = next(rendezvous("env://", timeout=_PATIENCE_BEFORE))
        store.set_timeout(_PATIENCE_BEFORE)
        self._store = _beside("lowrank", store)

    def begin(self, device: torch.device) -> None:
        """Make the process group, for tensors on `device`: when all are ready to take steps."""
        if self._host is not None:
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with _explain_lost_process():
            dist.init_process_group(
                backend,
                store=_beside("group", self._store),
                rank=self.rank,
                world_size=self.world,
                timeout=_PATIENCE,
                device_id=device if device.type == "cuda" else None,
            )
            self._host = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def end(self) -> None:
        """Let go of the process group that `begin` has made."""
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
        self._store.set(f"told/{self._exchanges}/{self.rank}", text.decode())
        return [self._store.get(f"told/{self._exchanges}/{rank}") for rank in range(self.world)]

    def _by_group(self, text: bytes) -> list[bytes]:
        length = torch.tensor([len(text)])
        lengths = [torch.zeros_like(length) for _ in range(self.world)]
        dist.all_gather(lengths, length, group=self._host)
        longest = max(int(each) for each in lengths)
        own = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
        texts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(texts, own, group=self._host)
        return [each[: int(length)].numpy().tobytes() for each, length in zip(texts, lengths)]

    def add(self, flat_N: torch.Tensor) -> None:
        """See Ranks. Each rank sums one part of all, as a ring would have it: twice the numbers travel, whatever the
        number of ranks."""
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
        """Whether rank 0 says the same, so that it need not be said twice. Called by every rank that ends by an error
        before training."""
        if self._store is None or self._host is not None:
            return False
        try:
            if self.rank == 0:
                self._store.set("error", str(error))
                # the store may be this process's own, and ends with it
                self._store.wait([f"heard/{rank}" for rank in range(1, self.world)], _ANSWERED_WITHIN)
                return False
            self._store.wait(["error"], _REPORT_TIMEOUT)
            first_error = self._store.get("error").decode()
            self._store.set(f"heard/{self.rank}", "")
            return first_error == str(error)
        except (RuntimeError, OSError):  # it has ended, or has nothing to say
            return False


def by_halves(terms: list[torch.Tensor]) -> torch.Tensor:
    """The sum of a power of two of tensors, as a binary tree adds them: halves of ranks or lanes are summed alike. The
    tensors are used up."""
    while len(terms) > 1:
        terms = [one.add_(other) for one, other in zip(terms[::2], terms[1::2])]
    return terms[0]


def processes_here(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks this process is one of: as a launcher has put it into the environment, or by the process group
    that is there. 1: it is alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    given = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(environment.get(name) for name in given) or not environment["WORLD_SIZE"].isdecimal():
        return 1
    return int(environment["WORLD_SIZE"])


def ranks_of_a_machine(world: int, environment: Mapping[str, str] = os.environ) -> int:
    """How many of `world` ranks share this machine, as torchrun says it; all, where nobody says."""
    local = environment.get("LOCAL_WORLD_SIZE", "")
    return int(local) if local.isdecimal() and int(local) and world % int(local) == 0 else world


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that speaks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return processes_here(environment) == 1 or environment["RANK"] == "0"


def _beside(name: str, store: Any) -> Any:
    """The store with keys of our own."""
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

"""Desync detection: after every step all ranks must have the same adapters, to the bit; a difference ends the run."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from hashlib import blake2b

import torch

from lowrank.errors import ModelError, raise_all
from lowrank.train.engine import Engine

COMPARED_EVERY = 100
"""Steps between two comparisons."""


class AdapterDesyncCheck:
    """Compares the ranks' adapters before the first step of this process and every `COMPARED_EVERY` steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._begun = engine, False

    def before_step(self, iteration: int) -> None:
        """Compare before step `iteration` + 1, if it is due. ModelError where the adapters differ."""
        if self._engine.lanes.ranks.world > 1 and (iteration % COMPARED_EVERY == 0 or not self._begun):
            compare_adapters(self._engine, iteration)
        self._begun = True


def compare_adapters(engine: Engine, iteration: int) -> None:
    """Compare digests of all jobs' parameters between the ranks. ModelError that names every difference."""
    ranks = engine.lanes.ranks
    digests = {str(slot): _parameter_digest(job.parameters) for slot, job in engine.jobs.items()}
    first, *others = ranks.exchange([socket.gethostname(), digests])
    problems = [
        f"rank {rank} on {other[0]} differs from rank 0 on {first[0]} in the adapter of slot {slot}"
        for rank, other in enumerate(others, start=1)
        for slot in first[1]
        if first[1][slot] != other[1].get(slot)
    ]
    heading = (
        f"after step {iteration} the ranks' adapters differ, though all have computed the same from the same numbers; "
        "a device, a driver or a library differs. Resume from an earlier checkpoint (resume: true) on equal machines:"
    )
    raise_all(ModelError, heading, problems)


def _parameter_digest(parameters: Mapping[str, torch.nn.Parameter]) -> str:
    digest = blake2b(digest_size=16)
    for name, parameter in parameters.items():
        flat = parameter.detach().reshape(-1).cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

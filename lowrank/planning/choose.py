"""Makes the two choices that settings may leave to a plan, and finds the changes that would make a run fit."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank.planning.placed import REPLICATED
from lowrank.planning.plan import MemoryPlan, Planner

TOKENS = (4096, 2048, 1024)
"""Forward passes of these sizes use the hardware equally well, or nearly; so they are tried before recomputation."""
_WORTH_IT = 0.8
"""Recomputing more than this share of the layers costs more time than `selective` on all of them."""


def choose(planner: Planner, micro_batch_tokens: int | str, activation_checkpointing: str | int) -> MemoryPlan:
    """The cheapest plan that fits, of those the settings allow (`auto`: free); if none does, the smallest."""
    smallest: MemoryPlan | None = None
    for tokens, policy in _candidates(planner, micro_batch_tokens, activation_checkpointing):
        plan = planner.plan(tokens, policy)
        if plan.fits:
            return plan
        if smallest is None or plan.peak < smallest.peak:
            smallest = plan
    assert smallest is not None
    return smallest


def _candidates(
    planner: Planner, micro_batch_tokens: int | str, activation_checkpointing: str | int
) -> Iterator[tuple[int, str | int]]:
    """The fastest first: whole steps, then smaller forward passes, then recomputation, then both to the end."""
    first = TOKENS if isinstance(micro_batch_tokens, str) else (micro_batch_tokens,)
    if activation_checkpointing != "auto":
        yield from ((tokens, activation_checkpointing) for tokens in first)
    else:
        yield from ((tokens, "none") for tokens in first)
        if planner.memory.num_layers:
            yield from ((first[-1], policy) for policy in _recomputing(planner, first[-1]))
    if isinstance(micro_batch_tokens, str):
        policy = (
            activation_checkpointing
            if activation_checkpointing != "auto"
            else _most(planner)
            if planner.memory.num_layers
            else "none"
        )
        yield from ((tokens, policy) for tokens in (512, 256, 128, 64, 1))


def _recomputing(planner: Planner, tokens: int) -> Iterator[str | int]:
    """Policies from the least to the most recomputation."""
    number = fewest_layers(planner, tokens)
    if number is not None and number <= _WORTH_IT * planner.memory.num_layers:
        yield number
    yield from ("selective", "full")
    if _most(planner) == "sqrt":
        yield "sqrt"


def _most(planner: Planner) -> str:
    """What keeps the least; layers that are moved one by one cannot be computed again in groups."""
    return "sqrt" if planner.memory.placed.base == REPLICATED else "full"


def fewest_layers(planner: Planner, tokens: int) -> int | None:
    """The smallest n so that recomputing the first n layers fits; None if all of them do not."""
    low, high = 1, planner.memory.num_layers
    if high < 1 or not planner.plan(tokens, high).fits:
        return None
    while low < high:
        middle = (low + high) // 2
        if planner.plan(tokens, middle).fits:
            high = middle
        else:
            low = middle + 1
    return low

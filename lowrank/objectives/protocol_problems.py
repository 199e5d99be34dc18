"""What an objective lacks of the protocols it is used by (`Objective`, and those that its `needs` call for)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from lowrank.errors import did_you_mean
from lowrank.objectives import Need, needs
from lowrank.objectives.rollout import RolloutSettings
from lowrank.records import Record
from lowrank.third_party import call_problem

PROTOCOL = ("record", "count", "loss")
"""The members that every objective has."""
_OF_NEEDS: dict[Need, tuple[str, ...]] = {
    "mismatched": ("observe(scores, batch)",),
    "observed": ("observe(scores, batch)",),
    "token_scores": ("score(logits_KV, target_K, reference_KV)",),
    "rollouts": ("compute_targets(rollouts)",),
}
_OF_ROLLOUTS = ("group", "steps_per_batch", "needs_reference")


def protocol_problems(objective: Any) -> Iterator[str]:
    """Yield what `objective` lacks, a sentence each: "Focal has no `record`, ..."."""
    name = type(objective).__name__
    kinds = get_args(Record)
    expected = f"the class of record that it learns from: {', '.join(kind.__name__ for kind in kinds)}"
    if not hasattr(objective, "record"):
        yield f"{name} has no `record`, {expected}"
    elif objective.record not in kinds:
        yield f"{name}.record is {objective.record!r}; expected {expected}"
    yield from _methods(objective, "count(batch)", "loss(scores, batch, totals)")
    yield from _needs(objective, name)


def _needs(objective: Any, name: str) -> Iterator[str]:
    given = getattr(objective, "needs", ())
    if isinstance(given, str) or not isinstance(given, (tuple, list, set, frozenset)):
        yield f"{name}.needs is {given!r}; expected a tuple of names, as ('reference',)"
        return
    for each in given:
        if each not in get_args(Need):
            yield f"{name}.needs has {each!r}{did_you_mean(str(each), get_args(Need))}"
    methods = [method for need, ones in _OF_NEEDS.items() if needs(objective, need) for method in ones]
    yield from _methods(objective, *dict.fromkeys(methods))
    if needs(objective, "rollouts"):
        for member in _OF_ROLLOUTS:
            if not hasattr(objective, member):
                yield f"{name} needs rollouts and has no `{member}`"
        if not isinstance(getattr(objective, "settings", None), RolloutSettings):
            yield f"{name} needs rollouts and has no `settings` that are a RolloutSettings (reward functions, sampling)"


def _methods(objective: Any, *calls: str) -> Iterator[str]:
    for call in calls:
        method, _, arguments = call.removesuffix(")").partition("(")
        found = getattr(objective, method, None)
        if not callable(found):
            yield f"{type(objective).__name__} has no method `{call}`"
        elif problem := call_problem(found, *arguments.split(", ")):
            yield f"{type(objective).__name__}.{method} {problem}"

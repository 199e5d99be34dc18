"""What a job minimises: one file each.

An objective file has a `Config` (settings, told apart by `type`) whose `build()` returns an
`Objective`. An objective sees log-probabilities of its own job's segments; never logits, model or
trainer. The engine counts over every micro-batch of the step first and hands the totals to each
call, so how a step is cut never changes a result. One file more, one objective more; nothing else
changes. A third party's is `type: my_module:MyObjective`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch

from lowrank.records import Batch, Scores, Totals
from lowrank.settings import Settings, choice_of

Metrics = dict[str, float | torch.Tensor]
"""Per-call contributions; the engine sums them over the micro-batches of a step."""


Need = Literal["reference", "mismatched", "value", "token_values", "rollouts"]
"""What an objective may ask for, besides log-probabilities, in its attribute `needs`:

reference    `scores.reference_T`: log-probabilities under the bare base, computed once before training
mismatched   for each sample a segment of role MISMATCHED, its prompt with another sample's answer. The objective's
             `observe(scores, batch) -> Totals` sees these without gradient before the step; what it gives is summed
             over the step and added to `totals`
token_values `scores.value_T`: such a vector on every hidden state, beside the log-probabilities
rollouts     segments that are answers of the job's own slot, given before each step and judged by the objective's
             `judge` (objectives/drawn.py); what it finds out stands in `batch.signals_T`
value        `scores.value_S`: a trained vector of the job on the last hidden state; nothing meets the vocabulary then
"""


def needs(objective: Any, what: Need) -> bool:
    """Whether `objective` asks for `what`."""
    return what in getattr(objective, "needs", ())


class ObjectiveSettings(Settings):
    """Settings of an objective, and what docs/methods.md says about it."""

    paper: ClassVar[str] = ""
    """Where the method is described."""
    when: ClassVar[str] = ""
    """When a person would choose it, in a few words."""


class Objective(Protocol):
    """A job's loss. May have an attribute `needs`, see `Need`."""

    record: type
    """The kind of record it learns from; checked against the data before any model loads."""

    def count(self, batch: Batch) -> Totals:
        """What the loss divides by, e.g. `{"tokens": 812.0}`. Needs no model."""
        ...

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """This batch's share of the step's loss: a sum divided by `totals`, so that shares add up."""
        ...


if TYPE_CHECKING:

    class ObjectiveConfig(Settings):
        """What every objective's `Config` offers."""

        type: str

        def build(self) -> Objective: ...
else:
    ObjectiveConfig = choice_of(__name__, default="sft")

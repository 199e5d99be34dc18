"""Objectives: the loss functions of jobs, one file each.

An objective file has a settings class with `type` whose `build()` returns an `Objective`. An objective is given the
log-probabilities of its own job's segments, never logits, model or trainer. The engine counts over every micro-batch of
the step first and passes the totals to each call, so micro-batching never changes a result. A new objective is one more
file; a third party's is `type: my_module:MyObjective`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch

from lowrank.batches import Batch, Scores, Totals
from lowrank.errors import ConfigError
from lowrank.settings import Settings, choice_of

Metrics = dict[str, float | torch.Tensor]
"""Per-call contributions; the engine sums them over the micro-batches of a step."""


Need = Literal[
    "reference", "mismatched", "observed", "value", "token_values", "rollouts", "token_scores", "reference_logits"
]
"""What an objective may need besides log-probabilities, by its attribute `needs`:

reference    `scores.reference_T`: log-probabilities under the bare base, computed once before training
mismatched   for each sample a segment of role MISMATCHED, its prompt with another sample's answer. The objective's
             `observe(scores, batch) -> Totals` sees these without gradient before the step; what it returns is
             summed over the step and added to `totals`
observed     the objective's `observe` sees all segments before the step, as above
token_scores `scores.score_T`: what the objective's `score` (see ScoresTokens) computes from each token's logits;
             `scores.logprob_T` is 0 then
reference_logits with token_scores: `score` is given the reference model's logits, too
token_values `scores.value_T`: a value head on every hidden state, beside the log-probabilities
rollouts     segments that are answers of the job's own slot, generated before each step; the objective's
             `compute_targets` (objectives/rollout.py) gives what stands in `batch.signals_T`
value        `scores.value_S`: a value head, a trained vector of the job, on the last hidden state; then no logits are
             computed
"""


def needs(objective: Any, what: Need) -> bool:
    """Return whether `objective` needs `what`."""
    return what in getattr(objective, "needs", ())


class ObjectiveSettings(Settings):
    """Settings of an objective, and what docs/methods.md says about it."""

    paper: ClassVar[str] = ""
    """Where the method is described."""
    when: ClassVar[str] = ""
    """When a person would choose it, in a few words."""


class Objective(Protocol):
    """A job's loss. May have an attribute `needs`, as ("reference",): see `Need`, and docs/add-an-objective.md."""

    record: type
    """The class of record that it is trained on; checked against the data before any model loads."""

    def count(self, batch: Batch) -> Totals:
        """Return what the loss is divided by, e.g. `{"tokens": 812.0}`. Needs no model."""
        ...

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """Return this micro-batch's part of the step's loss, a sum divided by `totals`, so that the parts add up to the
        loss; and numbers to log, which are added up too."""
        ...


def loss_and_metrics(
    objective: Objective, scores: Scores, batch: Batch, totals: Totals
) -> tuple[torch.Tensor, Metrics]:
    """Return what `objective.loss` returns. ConfigError if it is of another form than `Objective.loss` has."""
    found: Any = objective.loss(scores, batch, totals)
    if isinstance(found, tuple) and len(found) == 2:
        loss, metrics = found
        if isinstance(loss, torch.Tensor) and loss.dim() == 0 and isinstance(metrics, Mapping):
            return found
    raise ConfigError(
        f"objective {type(objective).__name__}: `loss` gave {_kind_of(found)}; expected a tuple of a tensor without "
        "dimensions (the micro-batch's part of the loss) and a dict of numbers to log, `{}` for none: "
        "docs/add-an-objective.md"
    )


def totals_of(objective: Objective, batch: Batch) -> Totals:
    """Return what `objective.count` returns. ConfigError if it is not a dict of numbers."""
    totals = objective.count(batch)
    found: Any = totals
    if isinstance(found, dict) and all(isinstance(each, (int, float)) for each in found.values()):
        return totals
    raise ConfigError(
        f"objective {type(objective).__name__}: `count` gave {_kind_of(found)}; expected a dict of numbers, as "
        '`{"tokens": float(batch.weight_T.sum())}`: docs/add-an-objective.md'
    )


def _kind_of(found: Any) -> str:
    if isinstance(found, torch.Tensor):
        return f"a tensor of shape {tuple(found.shape)}"
    if isinstance(found, tuple):
        return f"a tuple of {', '.join(map(_kind_of, found)) or 'nothing'}"
    if isinstance(found, Mapping):
        return "a dict of " + (", ".join(f"{name!r}: {_kind_of(value)}" for name, value in found.items()) or "nothing")
    return f"a {type(found).__name__}"


@runtime_checkable
class ScoresTokens(Protocol):
    """An objective that needs `token_scores`."""

    def score(self, logits_KV: torch.Tensor, target_K: torch.Tensor, reference_KV: torch.Tensor | None) -> torch.Tensor:
        """Return a score for each token, (K) float32, from its logits (K, V); rows are independent. `reference_KV`:
        logits of the reference model, if "reference_logits" is needed."""
        ...


@runtime_checkable
class ObservesMismatched(Protocol):
    """An objective that needs `mismatched` or `observed`."""

    def observe(self, scores: Scores, batch: Batch) -> Totals:
        """Return numbers that are summed over the step and added to `totals`; called without gradient."""
        ...


if TYPE_CHECKING:

    class ObjectiveConfig(Settings):
        """Settings of any objective."""

        type: str

        def build(self) -> Objective: ...
else:
    ObjectiveConfig = choice_of(__name__, default="sft", page="docs/add-an-objective.md")

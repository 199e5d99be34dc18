"""The settings of a sweep: which candidates there are, and which of them are worth going on with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from lowrank.settings import NonNegative, Positive, Settings

FieldName = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.\w+)*$", max_length=200)]
"""A setting of a job, as `optimizer.learning_rate`."""


class Draw(Settings):
    """Values that are drawn for one setting; exactly one of these."""

    uniform: tuple[float, float] | None = None
    """A number between these two."""
    log_uniform: tuple[float, float] | None = None
    """The same, equally likely in every power of ten: for learning rates."""
    integer: tuple[int, int] | None = None
    """A whole number from the first to the last."""
    choice: tuple[Any, ...] | None = None
    """One of these."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [name for name in ("uniform", "log_uniform", "integer", "choice") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of uniform, log_uniform, integer, choice, not {len(given)}")
        if self.choice is not None and not self.choice:
            raise ValueError("choice: there is nothing to choose from")
        for low, high in (each for each in (self.uniform, self.log_uniform, self.integer) if each is not None):
            if low > high:
                raise ValueError(f"{given[0]}: the first number is above the second")
            if self.log_uniform is not None and low <= 0:
                raise ValueError("log_uniform: both numbers are above 0")
        return self


class SweepConfig(Settings):
    """Candidates of a sweep: each entry of `candidates` with each combination of `grid`, with what `random` draws."""

    grid: dict[FieldName, tuple[Any, ...]] = Field(default_factory=dict)
    """Settings of jobs and their values: every combination is a candidate. `adapter.rank: [8, 16, 64]`."""
    random: dict[FieldName, Draw] = Field(default_factory=dict)
    """Settings of jobs and how their values are drawn; needs `max_trials`.
    `optimizer.learning_rate: {log_uniform: [1e-5, 1e-3]}`."""
    candidates: tuple[dict[FieldName, Any], ...] = ()
    """Candidates one by one: `[{adapter.rank: 8, optimizer.learning_rate: 1e-4}, ...]`."""
    max_trials: Positive | None = None
    """So many candidates at the most. Of a grid with more combinations, as many are drawn."""
    search: Literal["none", "successive_halving", "asha"] = "asha"
    """none: every candidate is trained to its end. asha: at each rung a candidate goes on if it is among the best 1 in
    `reduction_factor` of those that came so far (arXiv:1810.05934). successive_halving: it waits there for all others,
    and the best 1 in `reduction_factor` go on. Both need held-out rows."""
    reduction_factor: Annotated[int, Field(ge=2, le=100)] = 4
    """Of so many candidates at a rung one goes on to the next, which is so many times further."""
    first_rung: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Where candidates are compared first, as a share of their steps. Left out: so that about one in the last rung is
    trained to its end, and not within twice the warmup, where a learning rate that is too high still looks good."""
    metric: str | None = None
    """What candidates are compared by: loss (of held-out rows), or the `eval_metric` of the jobs. Left out: that."""
    sampler: Literal["random", "optuna"] = "random"
    """Who draws `random`. optuna: its TPE sampler, which learns from the candidates before (extra `search`)."""
    storage: Literal["none", "optuna"] = "none"
    """optuna: candidates and results also in `optuna.db` in the run folder, which `optuna-dashboard` opens; always with
    `sampler: optuna`."""
    seed: NonNegative = 0
    """Decides what is drawn. Every candidate has the run's own `seed` for its weights and the order of its data."""

    @model_validator(mode="after")
    def _has_candidates(self) -> Self:
        problems = [f"grid.{name}: there are no values" for name, values in self.grid.items() if not values]
        if not (self.grid or self.random or self.candidates):
            problems.append("there are no candidates: give grid, random or candidates")
        if self.random and self.max_trials is None:
            problems.append("random: say how many candidates to draw, max_trials: 16")
        twice = sorted(self.grid.keys() & self.random.keys())
        problems += [f"random.{name}: it is in grid already" for name in twice]
        problems += [
            f"candidates: {name} is in grid or random too"
            for name in sorted({name for each in self.candidates for name in each} & {*self.grid, *self.random})
        ]
        if self.sampler == "optuna":
            if self.grid or self.candidates or not self.random:
                problems.append("sampler: optuna draws what is in random; move grid and candidates there (choice: ...)")
            if self.search == "successive_halving":
                problems.append(
                    "search: successive_halving waits for all candidates, optuna draws one after another; choose asha"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self

"""Rollouts: what objectives share that train on the model's own answers. How answers are sampled, rewarded,
compared."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Protocol, cast

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from lowrank.errors import ConfigError
from lowrank.objectives import ObjectiveSettings
from lowrank.settings import NonNegative, Positive
from lowrank.third_party import load_code, may_run, names_code, parameters_of, signature_of

RewardFunction = Callable[..., Sequence[float | None]]
OF_THE_TRAINER = ("prompts", "completions", "completion_ids", "label")
"""Arguments of reward functions that are given whatever the columns of the data are."""


class RolloutSettings(ObjectiveSettings):
    """Settings that such objectives have in common. Names are TRL's."""

    reward_funcs: tuple[str, ...] = ()
    """Who judges answers: functions of your own, `my_module:fn`. Called with `prompts` and `completions` (lists of
    messages each), `completion_ids`, and every column of the data as a list (`label`: the answer in the data); gives a
    number for each answer, or None."""
    reward_weights: tuple[float, ...] | None = None
    """Weight of each reward function; left out: 1 each."""
    reward_model: str | None = None
    """The folder of an adapter that was trained with objective `reward` on the same base; what its value head gives for
    the last token of an answer is added to the rewards, with weight 1."""
    max_completion_length: Positive = 256
    """Tokens of an answer at the most."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the draws; higher tries more. What is learned from are probabilities at 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    top_k: NonNegative = 0
    """Draw from this many likeliest tokens; 0: all."""
    compile: bool = False
    """Draw answers through decoder layers compiled by torch (on NVIDIA's GPUs with CUDA graphs); those of all jobs, as
    soon as one asks for it. The first steps take up to a minute and are held to plain ones (docs/generation.md)."""

    @field_validator("reward_funcs", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("reward_funcs")
    @classmethod
    def _named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Only where their code may run are they looked for; else their names are all there is to check."""
        for name in value:
            if not names_code(name):
                raise ValueError(f"{name!r} is no reward function; write my_module:fn")
            if may_run(name):
                find_reward_function(name)
        return value

    @model_validator(mode="after")
    def _as_many_weights(self) -> Self:
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights: {len(self.reward_weights)} weights for {len(self.reward_funcs)} reward_funcs; "
                "give one for each, or leave them out"
            )
        return self


class RolloutObjective(Protocol):
    """An objective that needs "rollouts" (train/rollouts.py)."""

    settings: RolloutSettings

    @property
    def group(self) -> int:
        """The number of answers to each prompt."""
        ...

    @property
    def steps_per_batch(self) -> int:
        """The number of optimizer steps on the same answers."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether it needs log-probabilities of the answers under the bare base."""
        ...

    def compute_targets(self, rollouts: RolloutBatch) -> RolloutTargets:
        """Return what is learned from the answers of a step, such as advantages."""
        ...


class RolloutBatch:
    """The answers of one step, in groups: N of them, those to one prompt side by side.

    reward_NF   float64: what each reward function gave; NaN where it gave none
    weight_F    of the reward functions
    cut_N       bool: the answer was cut off at max_completion_length
    length_N    tokens of the answer
    logprob     (L) of each segment: log-probabilities of the answer's tokens when it was drawn, 0 on the prompt; None
                if nobody needs them
    reference   (L) of each segment: the same under the bare base
    value       (L) of each segment: the value head's prediction before each token was drawn; None if there is none
    answer      (L) of each segment, bool: the tokens of the answer
    """

    def __init__(self, reward_NF: np.ndarray, weight_F: np.ndarray, cut_N: np.ndarray, length_N: np.ndarray) -> None:
        self.reward_NF, self.weight_F, self.cut_N, self.length_N = reward_NF, weight_F, cut_N, length_N
        self.logprob: list[np.ndarray] | None = None
        self.reference: list[np.ndarray] | None = None
        self.value: list[np.ndarray] | None = None
        self.answer: list[np.ndarray] = []

    @property
    def reward_N(self) -> np.ndarray:
        """The weighted sum; NaN where no function gave anything."""
        total_N = np.nansum(self.reward_NF * self.weight_F, axis=1)
        return np.where(np.isnan(self.reward_NF).all(axis=1), np.nan, total_N)


class RolloutTargets:
    """What to learn. `signals`: for each segment, by name, (L) numbers of its tokens or one for all; where `learned_N`
    is False, an answer carries no loss."""

    def __init__(
        self, signals: list[dict[str, np.ndarray]], learned_N: np.ndarray, metrics: Mapping[str, float] | None = None
    ) -> None:
        self.signals, self.learned_N, self.metrics = signals, learned_N, dict(metrics or {})


def group_advantages(reward_N: np.ndarray, group: int, scale: str) -> tuple[np.ndarray, np.ndarray]:
    """`(advantages (N), standard deviations (N) they were divided by)` of answers in groups of `group`.

    The reward less the group's mean, divided by the standard deviation of the group (GRPO), of the whole step, or
    by nothing (Dr. GRPO). Answers without a reward (NaN) count in no mean and have advantage 0.
    """
    grouped_PG = reward_N.reshape(-1, group)
    mean_N = np.repeat([_mean(row) for row in grouped_PG], group)
    if scale == "batch":
        std_N = np.full(len(reward_N), _std(reward_N))
    else:
        std_N = np.repeat([_std(row) for row in grouped_PG], group)
    advantage_N = reward_N - mean_N
    if scale != "none":
        advantage_N = advantage_N / (std_N + 1e-4)
    return np.nan_to_num(advantage_N, nan=0.0), np.nan_to_num(std_N, nan=0.0)


def per_token_kl(logprob_T: torch.Tensor, reference_T: torch.Tensor) -> torch.Tensor:
    """An estimate of KL(model | base) at each token that is never negative (k3, http://joschu.net/blog/kl-approx.html)."""
    return torch.exp(reference_T - logprob_T) - (reference_T - logprob_T) - 1


def reward_metrics(rollouts: RolloutBatch, names: Sequence[str]) -> dict[str, float]:
    """What people want to see of a step's answers; named as in TRL."""
    found = {"reward": _mean(rollouts.reward_N), "reward_std": _std(rollouts.reward_N)}
    for name, reward_N in zip(names, rollouts.reward_NF.T):
        found[f"rewards/{name}/mean"], found[f"rewards/{name}/std"] = _mean(reward_N), _std(reward_N)
    found["completions/mean_length"] = float(rollouts.length_N.mean())
    found["completions/clipped_ratio"] = float(rollouts.cut_N.mean())
    return found


def short_names(reward_funcs: Sequence[str]) -> list[str]:
    """The functions' own names; with their module where two are called alike."""
    short = [name.partition(":")[2] for name in reward_funcs]
    return [each if short.count(each) == 1 else name for each, name in zip(short, reward_funcs)]


def find_reward_function(name: str) -> RewardFunction:
    """The function that `my_module:fn` names. ConfigError if there is none, or its code is not allowed to run."""
    found: Any = load_code(name)
    if not callable(found):
        raise ConfigError(f"{name!r} is no function")
    signature = signature_of(found)
    if signature is not None and any(each.kind is each.POSITIONAL_ONLY for each in _required(signature)):
        takes = parameters_of(signature)
        raise ConfigError(f"{name!r} takes {takes} by position, and reward functions are called by keyword")
    if inspect.iscoroutinefunction(found):
        raise ConfigError(f"{name!r} is `async def`, whose calls give no rewards; make it a plain function")
    return cast(RewardFunction, found)


def reward_function_problems(reward_funcs: Sequence[str], columns: Collection[str]) -> Iterator[str]:
    """Yield what the functions require and are never given: neither the trainer's own nor of the data's `columns`."""
    for name in reward_funcs:
        signature = signature_of(find_reward_function(name))
        missing = [each.name for each in _required(signature) if each.name not in {*OF_THE_TRAINER, *columns}]
        if missing:
            yield (
                f"objective.reward_funcs: {name} requires {', '.join(missing)}; {_called_with(columns)}. Give the rows "
                "such a column, or the parameter a default"
            )


def _required(signature: inspect.Signature | None) -> list[inspect.Parameter]:
    """The parameters without a default; none where they cannot be known."""
    parameters = [] if signature is None else list(signature.parameters.values())
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each for each in parameters if each.default is each.empty and each.kind not in variable]


def _called_with(columns: Iterable[str]) -> str:
    own = ", ".join(name for name in columns if name not in OF_THE_TRAINER)
    return f"it is called with {', '.join(OF_THE_TRAINER)} and the columns of the data ({own or 'none'})"


def call_reward_function(name: str, count: int, arguments: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """(N) float64 rewards; NaN where the function gave None. It is handed those arguments that it takes.

    ConfigError if it raises, or gives anything but `count` finite numbers and Nones.
    """
    function = find_reward_function(name)
    signature = signature_of(function)
    taken = arguments
    if signature is not None and not any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values()):
        taken = {key: value for key, value in arguments.items() if key in signature.parameters}
    try:
        given = list(function(**taken))
        reward_N = np.array([math.nan if each is None else float(each) for each in given], np.float64)
    except Exception as error:  # a third party's
        raise ConfigError(
            f"reward_funcs: {name} fails: {type(error).__name__}: {error}\n  {_called_with(arguments)}, and must "
            "return a list of numbers"
        ) from error
    if len(reward_N) != count:
        raise ConfigError(f"reward_funcs: {name} gave {len(reward_N)} rewards for {count} answers; give one for each")
    if np.isinf(reward_N).any():
        raise ConfigError(f"reward_funcs: {name} gave an infinite reward; give finite numbers, or None for no opinion")
    return reward_N


def _mean(value_N: np.ndarray) -> float:
    known_N = value_N[~np.isnan(value_N)]
    return float(known_N.mean()) if len(known_N) else math.nan


def _std(value_N: np.ndarray) -> float:
    """Of a sample (divided by N - 1); 0 for a single value, NaN for none."""
    known_N = value_N[~np.isnan(value_N)]
    if len(known_N) < 2:
        return 0.0 if len(known_N) else math.nan
    return float(known_N.std(ddof=1))

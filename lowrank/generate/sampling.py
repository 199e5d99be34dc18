"""From logits to tokens, each row by its own request's settings and its own random numbers.

The order is transformers': penalties, biases and constraints on the logits, then temperature, top-k, top-p,
min-p. A row's draw is a function of (seed, place in the answer, its logits), so what else is in the batch does
not enter, and a sequence that was put aside and computed again draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from lowrank.generate.constraint import Constraint
from lowrank.generate.request import GenerationConfig
from lowrank.kernels.accelerators import wide


class Drawing(Protocol):
    """What is drawn for (sequence.py)."""

    tokens: list[int]
    num_prompt: int
    virtual: int
    seed: int
    config: GenerationConfig
    constraint: Constraint | None


@dataclass(frozen=True)
class Choice:
    """The token of a row, and what the model thought of it. None: its probabilities are not finite.

    `fault`: there is no token although the model's own probabilities were finite, because of what was asked.
    """

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    fault: str | None = None


def choose(logits_BV: torch.Tensor, rows: Sequence[Drawing]) -> list[Choice]:
    """One token for each row; overwrites the logits."""
    reported = {
        index: _report(logits_BV[index], row) for index, row in enumerate(rows) if row.config.logprobs is not None
    }
    sound_B = [_is_adjusted(row) and math.isfinite(float(logits_V.max())) for logits_V, row in zip(logits_BV, rows)]
    for logits_V, row in zip(logits_BV, rows):
        _adjust(logits_V, row)
    likeliest_B, greedy_B = (each.tolist() for each in logits_BV.max(-1))
    choices = []
    for index, row in enumerate(rows):
        if not math.isfinite(likeliest_B[index]):
            choices.append(Choice(None, fault=_fault_of(row) if sound_B[index] else None))
            continue
        token = greedy_B[index] if row.config.temperature == 0 else _draw(logits_BV[index], row)
        if index in reported:
            logprob_V, top = reported[index]
            choices.append(Choice(token, float(logprob_V[token]), top))
        else:
            choices.append(Choice(token))
    return choices


def _report(logits_V: torch.Tensor, row: Drawing) -> tuple[torch.Tensor, tuple[tuple[int, float], ...]]:
    logprob_V = torch.log_softmax(logits_V, dim=-1)
    values, tokens = logprob_V.topk(min(row.config.logprobs or 0, len(logprob_V)))
    return logprob_V, tuple(zip(tokens.tolist(), values.tolist()))


def _is_adjusted(row: Drawing) -> bool:
    """Something that was asked for may leave no token at all."""
    return row.constraint is not None or row.config.repetition_penalty != 1.0 or bool(row.config.logit_bias)


def _fault_of(row: Drawing) -> str:
    problem = None if row.constraint is None else row.constraint.problem
    return problem or "repetition_penalty and logit_bias leave no token that is possible"


def _adjust(logits_V: torch.Tensor, row: Drawing) -> None:
    """Everything that comes before the temperature, in place."""
    config = row.config
    if config.repetition_penalty != 1.0:
        seen = torch.tensor(row.tokens[row.virtual :], device=logits_V.device)
        value = logits_V[seen]
        logits_V[seen] = torch.where(value < 0, value * config.repetition_penalty, value / config.repetition_penalty)
    answered = row.tokens[row.num_prompt :]
    if answered and (config.presence_penalty or config.frequency_penalty):
        tokens, times = torch.tensor(answered, device=logits_V.device).unique(return_counts=True)
        logits_V[tokens] -= config.presence_penalty + config.frequency_penalty * times.to(logits_V.dtype)
    for token, bias in config.logit_bias.items():
        logits_V[token] += bias
    if row.constraint is not None:
        row.constraint.mask(logits_V)


def _draw(logits_V: torch.Tensor, row: Drawing) -> int:
    """One token from what temperature, top-k, top-p and min-p leave."""
    config = row.config
    scaled_V = wide(logits_V) / config.temperature
    if not config.top_k and config.top_p == 1.0:
        chance_V, token_V = torch.softmax(scaled_V, dim=-1), None
    else:
        if config.top_k and config.top_k < len(scaled_V):
            scaled_V, token_V = scaled_V.topk(config.top_k)  # sorted
        else:
            scaled_V, token_V = scaled_V.sort(descending=True)
        chance_V = torch.softmax(scaled_V, dim=-1)
        before_V = chance_V.cumsum(-1) - chance_V
        kept_V = before_V < config.top_p
        kept_V[0] = True
        chance_V = torch.where(kept_V, chance_V, 0)
    if config.min_p:
        chance_V = torch.where(chance_V >= config.min_p * chance_V.max(), chance_V, 0)
    reached_V = chance_V.cumsum(-1)
    place = len(row.tokens) - row.num_prompt
    level = _uniform(row.seed, place) * float(reached_V[-1])
    index = int(
        torch.searchsorted(reached_V, torch.tensor(level, dtype=reached_V.dtype, device=reached_V.device), right=True)
    )
    index = min(index, int(chance_V.nonzero()[-1]))
    return index if token_V is None else int(token_V[index])


def _uniform(seed: int, place: int) -> float:
    """In [0, 1), from a counter-based generator (Philox): the same for the same seed and place."""
    return float(np.random.Generator(np.random.Philox(key=seed % (1 << 64), counter=place)).random())

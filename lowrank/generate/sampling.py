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

from lowrank.devices import to_device
from lowrank.generate.constraint import Constraint
from lowrank.generate.request import GenerationConfig
from lowrank.kernels.accelerators import wide

_IN_CACHE = 1 << 17
"""Logits that a processor handles at a time, so that what lies between stays in its caches."""


TokenLogprobs = dict[int, tuple[float | None, tuple[tuple[int, float], ...]]]
"""By row: the log-probability of its token, and (token, log-probability) of the likeliest."""


class SamplingRow(Protocol):
    """What sampling reads of a sequence (sequence.py), whose next token it draws."""

    tokens: list[int]
    num_prompt: int
    virtual: int
    seed: int
    config: GenerationConfig
    constraint: Constraint | None


@dataclass(frozen=True)
class SampledToken:
    """The token of a row with its log-probability and the likeliest tokens'. None: the probabilities are not finite.

    `fault`: why there is no token although the model's own probabilities were finite, which is for what was asked.
    """

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    fault: str | None = None


def choose(logits_BV: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """One token for each row; overwrites the logits.

    A GPU is waited for once, and once more where log-probabilities are reported.
    """
    reported = [index for index, row in enumerate(rows) if row.config.logprobs is not None]
    logprob_RV = torch.log_softmax(_of(logits_BV, reported), dim=-1) if reported else None
    own_B = logits_BV.amax(-1) if any(map(_is_adjusted, rows)) else None
    for logits_V, row in zip(logits_BV, rows):
        _adjust(logits_V, row)
    likeliest_B, token_B = logits_BV.max(-1)
    on_cpu = logits_BV.device.type == "cpu"
    for (in_order, top_k), indices in _alike(rows).items():
        together = max(1, _IN_CACHE // logits_BV.shape[-1]) if on_cpu else len(indices)
        for first in range(0, len(indices), together):
            some = indices[first : first + together]
            drawn = _draw(_of(logits_BV, some), [rows[index] for index in some], in_order, top_k)
            token_B.index_copy_(0, to_device(torch.tensor(some), drawn.device), drawn)
    numbers_3B = torch.stack([wide(likeliest_B), wide(likeliest_B if own_B is None else own_B), wide(token_B)])
    likeliest, own, tokens = numbers_3B.tolist()
    logprobs_of_row: TokenLogprobs = (
        {} if logprob_RV is None else _token_logprobs(logprob_RV, _of(token_B, reported), rows, reported)
    )
    choices = []
    for index, row in enumerate(rows):
        if math.isfinite(likeliest[index]):
            choices.append(SampledToken(int(tokens[index]), *logprobs_of_row.get(index, (None, ()))))
        else:
            too_much = _is_adjusted(row) and math.isfinite(own[index])
            choices.append(SampledToken(None, fault=_fault_of(row) if too_much else None))
    return choices


def _of(value_B: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
    """The rows at these places, in order."""
    if len(indices) == len(value_B):
        return value_B
    return value_B.index_select(0, to_device(torch.tensor(indices), value_B.device))


def _token_logprobs(
    logprob_RV: torch.Tensor, token_R: torch.Tensor, rows: Sequence[SamplingRow], reported: Sequence[int]
) -> TokenLogprobs:
    """Of each row that wants it: the log-probability of its token, and as many of the likeliest as it asked for."""
    wanted = [rows[index].config.logprobs or 0 for index in reported]
    value_RK, likely_RK = logprob_RV.topk(min(max(wanted), logprob_RV.shape[-1]))
    own_R1 = logprob_RV.gather(1, token_R[:, None])
    read_R = torch.cat([wide(own_R1), wide(value_RK), wide(likely_RK)], dim=1).tolist()
    found: TokenLogprobs = {}
    for index, number, (own, *both) in zip(reported, wanted, read_R):
        values, likely = both[: len(both) // 2], both[len(both) // 2 :]
        found[index] = own, tuple(zip(map(int, likely[:number]), values[:number]))
    return found


def _is_adjusted(row: SamplingRow) -> bool:
    """Something that was asked for may leave no token at all."""
    return row.constraint is not None or row.config.repetition_penalty != 1.0 or bool(row.config.logit_bias)


def _fault_of(row: SamplingRow) -> str:
    problem = None if row.constraint is None else row.constraint.problem
    return problem or "repetition_penalty and logit_bias leave no token that is possible"


def _adjust(logits_V: torch.Tensor, row: SamplingRow) -> None:
    """Everything that comes before the temperature, in place."""
    config = row.config
    if config.repetition_penalty != 1.0:
        seen = to_device(torch.tensor(row.tokens[row.virtual :]), logits_V.device)
        value = logits_V[seen]
        logits_V[seen] = torch.where(value < 0, value * config.repetition_penalty, value / config.repetition_penalty)
    answered = row.tokens[row.num_prompt :]
    if answered and (config.presence_penalty or config.frequency_penalty):
        tokens, times = torch.tensor(answered).unique(return_counts=True)
        penalty = config.presence_penalty + config.frequency_penalty * times.to(logits_V.dtype)
        logits_V[to_device(tokens, logits_V.device)] -= to_device(penalty, logits_V.device)
    for token, bias in config.logit_bias.items():
        logits_V[token] += bias
    if row.constraint is not None:
        row.constraint.mask(logits_V)


def _alike(rows: Sequence[SamplingRow]) -> dict[tuple[bool, int], list[int]]:
    """Places of the rows that draw, by how: (whether from sorted ones, from how many of them; 0: from all)."""
    found: dict[tuple[bool, int], list[int]] = {}
    for index, row in enumerate(rows):
        config = row.config
        if config.temperature > 0:
            found.setdefault((bool(config.top_k) or config.top_p != 1.0, config.top_k), []).append(index)
    return found


def _draw(logits_BV: torch.Tensor, rows: Sequence[SamplingRow], in_order: bool, top_k: int) -> torch.Tensor:
    """(B) tokens from what temperature, top-k, top-p and min-p leave of each row."""
    if len(rows) == 1 and logits_BV.device.type != "cpu":
        # CUDA sums up a single row by another algorithm than several, and not to the same bits twice
        return _draw(logits_BV.expand(2, -1), [*rows, *rows], in_order, top_k)[:1]
    scaled_BV, token_BV = wide(logits_BV), None
    numbers = [
        (config.temperature, config.top_p, config.min_p, _uniform(row.seed, len(row.tokens) - row.num_prompt))
        for row, config in ((row, row.config) for row in rows)
    ]
    numbers_4B1 = to_device(torch.tensor(numbers, dtype=scaled_BV.dtype).T.contiguous()[..., None], scaled_BV.device)
    temperature_B1, top_p_B1, min_p_B1, uniform_B1 = numbers_4B1
    scaled_BV = scaled_BV / temperature_B1
    if in_order and 0 < top_k < scaled_BV.shape[-1]:
        scaled_BV, token_BV = scaled_BV.topk(top_k)  # sorted
    elif in_order:
        scaled_BV, token_BV = scaled_BV.sort(descending=True)
    chance_BV = torch.softmax(scaled_BV, dim=-1)
    if in_order:
        kept_BV = chance_BV.cumsum(-1) - chance_BV < top_p_B1
        kept_BV[:, 0] = True
        chance_BV = torch.where(kept_BV, chance_BV, 0)
    if any(row.config.min_p for row in rows):
        chance_BV = torch.where(chance_BV >= min_p_B1 * chance_BV.amax(-1, keepdim=True), chance_BV, 0)
    reached_BV = chance_BV.cumsum(-1)
    index_B1 = torch.searchsorted(reached_BV, uniform_B1 * reached_BV[:, -1:], right=True)
    place_V = torch.arange(chance_BV.shape[-1], device=chance_BV.device)
    last_B1 = torch.where(chance_BV > 0, place_V, 0).amax(-1, keepdim=True)  # where rounding, or NaN, goes beyond it
    index_B1 = torch.minimum(index_B1, last_B1)
    return (index_B1 if token_BV is None else token_BV.gather(1, index_B1))[:, 0]


def _uniform(seed: int, place: int) -> float:
    """In [0, 1), from a counter-based generator (Philox): the same for the same seed and place."""
    return float(np.random.Generator(np.random.Philox(key=seed % (1 << 64), counter=place)).random())

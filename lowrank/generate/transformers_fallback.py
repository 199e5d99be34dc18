"""One fixed batch through transformers' own `generate`, for families whose cache is not keys and values alone.

transformers runs the model and keeps its cache; which token comes next is decided here, by the same
sampling as everywhere, in the place where transformers lets logits be changed. Rows that are over
stay in the batch until all are. Pictures were looked at before: a row's own adapter is in the tower only in a pass of
that row alone, while `generate` would send all pictures through together.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from lowrank.adapters.bank import Bank
from lowrank.adapters.routing import ForwardContext
from lowrank.generate.sampling import choose
from lowrank.generate.sequence import GenerationSequence
from lowrank.kernels.precision import float32_or_wider
from lowrank.models.base import Base
from lowrank.models.loading.quiet import quiet_transformers

_FEATURES = "mm_encoder_outputs"


class _Chooser(LogitsProcessor):
    """Takes the next token of every row that is not over, and leaves transformers no other choice."""

    def __init__(self, rows: list[GenerationSequence], between: Callable[[], None]) -> None:
        self.rows = rows
        self.between = between

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.between()
        places = [place for place, row in enumerate(self.rows) if row.finish is None]
        members = [self.rows[place] for place in places]
        wide = float32_or_wider(scores.dtype)
        for row, choice in zip(members, choose(scores[places].to(wide), members) if members else ()):
            row.take(choice)
        chosen = torch.tensor([row.tokens[-1] for row in self.rows], device=scores.device)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen[:, None], 0.0)


class _AllOver(StoppingCriteria):
    def __init__(self, rows: list[GenerationSequence]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        over = [row.finish is not None for row in self.rows]
        return torch.tensor(over, dtype=torch.bool, device=input_ids.device)


def image_problem(base: Base) -> str | None:
    """Why transformers' `generate` cannot be given what a tower made of pictures, in words; None: it can."""
    if _FEATURES in inspect.signature(base.causal_lm.forward).parameters:
        return None
    return f"transformers' generate takes no features of pictures for models of type {base.model.config.model_type!r}"


@contextlib.contextmanager
def _without_settings_of_its_own(model: Any) -> Generator[None, None, None]:
    """What a request leaves open transformers takes from the checkpoint's generation_config.json: its end tokens would
    end rows that go on here, its penalties change logits before they are drawn from."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def answer(base: Base, bank: Bank, rows: list[GenerationSequence], between: Callable[[], None]) -> None:
    """Answer all `rows` (sorted by slot), left-padded. `between` is called before each token."""
    longest = max(len(row.tokens) for row in rows)
    token_BL = torch.zeros(len(rows), longest, dtype=torch.int64)
    seen_BL = torch.zeros_like(token_BL)
    for place, row in enumerate(rows):
        token_BL[place, longest - len(row.tokens) :] = torch.tensor(row.tokens)
        seen_BL[place, longest - len(row.tokens) :] = 1
    ranges = tuple((row.slot, place, place + 1) for place, row in enumerate(rows))
    routed = bank.routing.using(ForwardContext(len(rows), ranges))
    config = GenerationConfig(max_new_tokens=max(row.max_new_tokens for row in rows), do_sample=False, pad_token_id=0)
    shown = (
        {}
        if base.media_encoder is None
        else base.media_encoder.in_rows([row.encoded for row in rows], token_BL.to(base.device))
    )
    shown |= base.types_of_prompts([longest] * len(rows), token_BL.to(base.device))
    takes = inspect.signature(base.causal_lm.forward).parameters
    own = _without_settings_of_its_own(base.causal_lm)
    with torch.no_grad(), routed, own, base.using_attention(base.own_attention), quiet_transformers():
        base.causal_lm.generate(
            input_ids=token_BL.to(base.device),
            attention_mask=seen_BL.to(base.device),
            **{name: value for name, value in shown.items() if name in takes},
            generation_config=config,
            logits_processor=LogitsProcessorList([_Chooser(rows, between)]),
            stopping_criteria=StoppingCriteriaList([_AllOver(rows)]),
        )

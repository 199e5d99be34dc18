"""The load-balancing loss of a mixture's routers (arXiv:2101.03961), per job, as transformers computes it.

    E sum_e (fraction of the top-k choices that expert e got) (mean router probability of e)

over the tokens of a forward pass and all layers of experts. A job's step has the mean over its passes, weighed by their
tokens: where a step is one pass, as transformers has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lowrank.batches import Batch
from lowrank.errors import ModelError
from lowrank.models.base import Base


def expert_numbers(base: Base) -> tuple[int, int]:
    """Return `(experts, experts per token)`. ModelError for a model whose router logits transformers does not
    record."""
    config: Any = base.model.config.get_text_config()
    experts = next((n for name in ("num_experts", "num_local_experts") if (n := getattr(config, name, None))), None)
    per_token = getattr(config, "num_experts_per_tok", None)
    recorded = getattr(base.backbone, "_can_record_outputs", None) or {}
    if not experts or not per_token or "router_logits" not in recorded:
        raise ModelError(
            f"model.router_aux_loss_coef: {base.name} ({type(base.model).__name__}) has no routers that transformers "
            "records; leave it out"
        )
    if base.layout != "packed":
        raise ModelError(
            "model.router_aux_loss_coef: only where documents are packed, and this base pads; leave it out"
        )
    return int(experts), int(per_token)


@dataclass(frozen=True)
class TokensOfStep:
    """Tokens of all passes of a step, on all ranks."""

    all: int
    by_slot: Mapping[int, int]

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> TokensOfStep:
        """Count the tokens of these batches."""
        found: dict[int, int] = {}
        for batch in batches:
            for slot, first, end in batch.slot_ranges():
                found[slot] = found.get(slot, 0) + end - first
        return cls(sum(batch.num_tokens for batch in batches), found)


def router_losses(base: Base, batch: Batch, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
    """Return each job's part of its step's router loss, by slot, from the training pass that has just run."""
    coefficient = base.router_aux_loss_coef
    if coefficient is None:
        return {}
    logits = base.take_router_logits()
    experts, per_token = expert_numbers(base)
    found = {}
    for slot, first, end in batch.slot_ranges():
        rows = tuple(each.reshape(-1, experts)[first:end] for each in logits)
        loss = load_balancing_loss_func(rows, experts, per_token)  # pyright: ignore[reportArgumentType] (any length)
        assert isinstance(loss, torch.Tensor), "there are layers of experts"
        found[slot] = coefficient * loss * (end - first) / tokens[slot]
    return found

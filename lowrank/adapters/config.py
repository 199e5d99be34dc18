"""Settings every adapter variant shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from lowrank.settings import Fraction, Positive, Settings


class AdapterSettings(Settings):
    """One job's adapter. PEFT's meaning of every field; a variant's `Config` adds `type` and its own."""

    peft_fields: ClassVar[Mapping[str, Any] | None] = None
    """What tells this variant apart in PEFT's adapter_config.json, beside the fields below; None: PEFT has no such
    variant, and its adapters cannot be saved."""

    rank: Positive = 16
    """Rank of the update, PEFT's `r`."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale, PEFT's `lora_alpha`. Left out: twice the rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the head), names (`[q_proj, v_proj]`), or one regular expression over full
    module names. `lm_head` and the embedding may be named."""
    exclude_modules: str | tuple[str, ...] = ()
    """Names, or one regular expression, taken out of `target_modules`."""
    rank_pattern: dict[str, Positive] = Field(default_factory=dict)
    """Another rank for some modules: {name or regular expression: rank}."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Another alpha for some modules."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole, as the job's own copy: lm_head, embed_tokens, norms."""
    path: str | None = None
    """Continue from this adapter folder (PEFT layout) instead of a fresh one; its rank, alpha, targets are used."""

"""Settings every adapter variant shares."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from lowrank.adapters.patterns import pattern_problem
from lowrank.adapters.peft_kind import LORA, PeftKind
from lowrank.models.layers import LANGUAGE, PROJECTOR, SOUND, TOWER
from lowrank.settings import Fraction, Settings

Rank = Annotated[int, Field(gt=0, le=1_000_000)]


class AdapterSettings(Settings):
    """One job's adapter. PEFT's meaning of every field; a variant's settings class adds `type` and its own."""

    paper: ClassVar[str] = ""
    """Where the method is described."""
    when: ClassVar[str] = ""
    """When a person would choose it, in a few words for docs/methods.md."""
    peft: ClassVar[PeftKind] = LORA
    """What it is in files in PEFT's layout: PEFT's type, tensors and their shapes, names of settings."""
    peft_fields: ClassVar[Mapping[str, Any] | None] = None
    """Fields of adapter_config.json that tell this variant apart, or that it needs as they are. None: PEFT has no such
    variant; its adapters are saved as what `as_saved` says, or not at all."""
    refused: ClassVar[Mapping[str, str]] = {}
    """Shared settings that this variant cannot honor, and why."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Shared settings that mean nothing to it."""
    reaches_heads: ClassVar[bool] = False
    """It may sit on the output head, embeddings and fused experts: a plain pair A, B that starts as LoRA's."""
    needs_quantized: ClassVar[bool] = False
    """It makes sense only where the base's storage loses something."""
    needs_calibration: ClassVar[bool] = False
    """It starts from what the job's own data does to the base's layers (adapters/calibration.py)."""

    rank: Rank = 16
    """Rank of the update, PEFT's `r`."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale, PEFT's `lora_alpha`. Left out: twice the rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer of the language model but the head), names (`[q_proj, v_proj]`), or one regular
    expression over full module names. `lm_head` and the embedding may be named. Names mean the language model's own
    where towers beside it have layers called the same; those are reached by full names or an expression."""
    exclude_modules: str | tuple[str, ...] = ()
    """Names, or one regular expression, taken out of `target_modules`."""
    freeze_vision_tower: bool = True
    """False: `all-linear` and names in `target_modules` reach the layers of towers for pictures and sounds as well."""
    freeze_multi_modal_projector: bool = True
    """False: they reach the layers between tower and language model as well."""
    freeze_language_model: bool = False
    """True: they leave the language model's layers out."""
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Another rank for some modules: {name or regular expression: rank}."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Another alpha for some modules."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole, as the job's own copy: lm_head, embed_tokens, norms."""
    target_parameters: tuple[str, ...] = ()
    """Weights that are no layer of their own, PEFT's `target_parameters`: the fused experts of a mixture, by the end of
    their names (`[mlp.experts.gate_up_proj, mlp.experts.down_proj]`). `all-linear` leaves them out."""
    trainable_token_indices: tuple[int | str, ...] = ()
    """Tokens, by id or as they are written (`["<call>"]`), of which the job trains rows of its own in the embedding and
    in the head: what tokens need that `lowrank vocab` added."""
    loraplus_lr_ratio: float | None = Field(default=None, gt=0)
    """LoRA+ (arXiv:2402.12354): B learns this many times as fast as A (16 is usual); left out: equally fast."""
    loraplus_lr_embedding: float = Field(default=1e-6, gt=0)
    """With LoRA+: the learning rate of adapters on embeddings."""
    path: str | None = None
    """Continue from this adapter folder (PEFT layout) instead of a fresh one; its rank, alpha, targets are used."""

    @model_validator(mode="after")
    def _can_be_honored(self) -> Self:
        problems = [
            f"{name}: {reason}"
            for name, reason in self.refused.items()
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)
        ]
        if self.trainable_token_indices and not self.peft.has_token_rows:
            problems.append(
                f"trainable_token_indices: PEFT's files for {self.peft.type} have no place for them; use lora"
            )
        problems += [*self._unsaved_patterns(), *self._wrong_parts(), *self._wrong_patterns()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def parts(self) -> frozenset[str]:
        """Of the model, those in which `all-linear` and names mean layers (models/layers.py)."""
        frozen = {
            LANGUAGE: self.freeze_language_model,
            TOWER: self.freeze_vision_tower,
            SOUND: self.freeze_vision_tower,
            PROJECTOR: self.freeze_multi_modal_projector,
        }
        return frozenset(part for part, is_frozen in frozen.items() if not is_frozen)

    def _unsaved_patterns(self) -> list[str]:
        """Patterns for which files of its PEFT type have no place: an adapter trained with them could not be read."""
        of_rank = self.peft.has_patterns
        has_place = {"rank": of_rank, "alpha": of_rank and "alpha" in self.peft.names}
        return [
            f"{name}_pattern: PEFT's files for {self.peft.type} have no place for another {name} of some modules; set "
            f"adapter.{name} for all, or, in a variant of your own, has_patterns=True in its PeftKind"
            for name, has in has_place.items()
            if not has and getattr(self, f"{name}_pattern") and not {*self.refused, *self.unused} & {f"{name}_pattern"}
        ]

    def _wrong_parts(self) -> list[str]:
        if not self.parts:
            return [
                "freeze_language_model, freeze_vision_tower, freeze_multi_modal_projector: nothing is left to adapt"
            ]
        whole = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if whole and self.parts != frozenset({LANGUAGE}):
            return [
                "target_modules is an expression, which says itself what it reaches; leave the freeze_ settings out"
            ]
        return []

    def _wrong_patterns(self) -> list[str]:
        written = {
            "target_modules": [self.target_modules] if isinstance(self.target_modules, str) else [],
            "exclude_modules": [self.exclude_modules] if isinstance(self.exclude_modules, str) else [],
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        }
        return [f"{name}: {why}" for name, own in written.items() for each in own if (why := pattern_problem(each))]

    def as_saved(self) -> AdapterSettings:
        """The settings under which files describe it: its own, or those of a variant that PEFT knows."""
        return self

    @classmethod
    def read_as_saved(
        cls, fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
        """Of a variant with a PEFT type of its own that is saved as another: PEFT's adapter_config.json and tensors of
        the first, turned into those of the second, by their names in files. ModelError if they cannot be."""
        return fields, tensors

    @classmethod
    def settings_from_tensors(cls, modules: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, Any]:
        """Settings that the tensors of a file say better than adapter_config.json, by module and name in files."""
        del modules
        return {}

    def fields_from_tensors(self, names: Collection[str]) -> dict[str, Any]:
        """Fields of adapter_config.json that depend on which tensors are saved, by the bank's names."""
        del names
        return {}

    @property
    def unsaveable(self) -> str | None:
        """Why its adapters could not be written to files, and what to do; None: they can be."""
        saved = self.as_saved()
        return no_file_form(saved) if saved.peft_fields is None else None

    def schedule_problem(self, num_steps: int) -> str | None:
        """Why it cannot be trained for so many optimizer steps."""
        del num_steps
        return None

    @property
    def unmergeable(self) -> str | None:
        """Why it cannot become part of the model's weights; None: it can."""
        return None

    @property
    def title(self) -> str:
        """In a few words: `dora r=16`."""
        kind = getattr(self, "type", "adapter")
        return kind if "rank" in self.unused else f"{kind} r={self.rank}"

    def shared(self) -> dict[str, Any]:
        """The settings that all variants have, as they were set."""
        return {
            name: getattr(self, name)
            for name in AdapterSettings.model_fields
            if name in self.model_fields_set or name == "rank"
        }

    def learning_rate_factor(self, name: str, parameter: torch.Tensor, learning_rate: float) -> float:
        """What a tensor's learning rate is multiplied by (LoRA+; tensors are sorted as PEFT's
        `create_loraplus_optimizer` sorts them)."""
        if self.loraplus_lr_ratio is None:
            return 1.0
        if ".lora_embedding_" in name:
            return self.loraplus_lr_embedding / learning_rate
        return self.loraplus_lr_ratio if ".lora_B" in name or parameter.ndim == 1 else 1.0


def no_file_form(config: AdapterSettings) -> str:
    """What is wrong with a variant that files in PEFT's layout have no place for, and the way out."""
    return (
        f"{getattr(config, 'type', type(config).__name__)!r} has no form in PEFT's layout, so nothing it learns could "
        "be saved; give its settings class `as_saved`, which returns the settings of a variant that PEFT knows (pissa "
        "is saved as lora), or `peft_fields` with a `peft` of its own (docs/add-a-variant.md)"
    )

"""FastVisionModel: bases that see pictures, with the names, arguments and defaults of Unsloth's vision notebooks.

What it gives beside the model is transformers' processor of the family, with Pillow as its backend, in the place of a
tokenizer. Adapters reach the language model and the tower; the projector between them stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowrank.compat.unsloth.arguments import warn_once
from lowrank.compat.unsloth.front import FastLanguageModel
from lowrank.errors import ConfigError
from lowrank.media.processor import processor_of


class FastVisionModel(FastLanguageModel):
    """As FastLanguageModel, for a base with a tower."""

    @staticmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        model_name: str, max_seq_length: int | None = 2048, **others: Any
    ) -> tuple[Any, Any]:
        """(model, processor); arguments as of FastLanguageModel. ConfigError for a base without a vision tower."""
        model, tokenizer = FastLanguageModel.from_pretrained(model_name, max_seq_length, **others)
        found = processor_of(tokenizer)
        if found is None or not found.supports_images:
            problem = "has no tower for pictures, or not the files of its processor"
            raise ConfigError(f"{model_name} {problem}; load it with FastLanguageModel")
        processor = found.own
        processor.chat_template = tokenizer.chat_template
        return model, processor

    @staticmethod
    def get_peft_model(  # pyright: ignore[reportIncompatibleMethodOverride]
        model: Any,
        r: int = 16,
        target_modules: str | Sequence[str] | None = None,
        finetune_vision_layers: bool = True,
        finetune_language_layers: bool = True,
        **others: Any,
    ) -> Any:
        """As of FastLanguageModel; `target_modules` None or "all-linear": all linear layers of the tower, of the
        language model, or of both."""
        if others.pop("finetune_audio_layers", False):
            warn_once("finetune_audio_layers has no effect: sound is not trained here")
        return FastLanguageModel.get_peft_model(
            model,
            r,
            target_modules,
            finetune_vision_layers=finetune_vision_layers,
            finetune_language_layers=finetune_language_layers,
            **others,
        )

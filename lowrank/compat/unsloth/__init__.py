"""Unsloth's front over lowrank: a notebook written for Unsloth runs with one import changed, on a CPU too.

    from lowrank.compat.unsloth import FastLanguageModel

What Unsloth has and this has not is refused by name (ConfigError); nothing is ignored without a word. The trainers are
TRL's and transformers' own: `pip install 'lowrank-llm[trl]'`. Importing this package puts a translation before their
constructors, for what older releases took (`trl_arguments`).
"""

from __future__ import annotations

from typing import Any

try:
    from lowrank.compat.unsloth.front import FastLanguageModel, FastModel, is_bfloat16_supported
except ModuleNotFoundError as error:
    if error.name not in ("peft", "trl"):
        raise
    raise ImportError("lowrank.compat.unsloth needs PEFT and TRL: pip install 'lowrank-llm[trl]'") from error

from lowrank.compat.unsloth import trl_arguments
from lowrank.compat.unsloth.chat_templates import (
    apply_chat_template,
    get_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
    train_on_responses_only,
)
from lowrank.compat.unsloth.rewards import (
    check_python_modules,
    create_locked_down_function,
    execute_with_time_limit,
    is_port_open,
    launch_openenv,
)
from lowrank.compat.unsloth.sampling import SamplingParams
from lowrank.compat.unsloth.vision import FastVisionModel
from lowrank.compat.unsloth.vision_collator import UnslothVisionDataCollator

is_bf16_supported = is_bfloat16_supported
FastLlamaModel = FastMistralModel = FastQwen2Model = FastQwen3Model = FastGemmaModel = FastLanguageModel
FastQwen3MoeModel = FastGraniteModel = FastFalconH1Model = FastLanguageModel
FastTextModel = FastModel

_ELSEWHERE = {
    "FastSentenceTransformer": "embedding models are not trained by this front",
    "FastDiffusionModel": "diffusion models are not trained here",
    "QGaloreConfig": "Q-GaLore is not here; `lowrank train` has GaLore (optimizer: galore)",
    "RawTextDataLoader": "give texts to SFTTrainer in a column `text`, or files to `lowrank train`",
    "TextPreprocessor": "give texts to SFTTrainer in a column `text`, or files to `lowrank train`",
}
"""Unsloth's names that this front has not, and what to do."""
_OF_TRAINERS = ("UnslothTrainer", "UnslothTrainingArguments", "unsloth_train")


def PatchDPOTrainer() -> None:
    """Nothing: importing this package was enough."""


PatchKTOTrainer = PatchORPOTrainer = PatchDPOTrainer


def PatchFastRL(algorithm: str | None = None, FastLanguageModel: Any = None) -> None:
    """Nothing: importing this package was enough."""
    del algorithm, FastLanguageModel


def __getattr__(name: str) -> Any:
    if name in _OF_TRAINERS:  # importing TRL's SFTTrainer takes seconds
        from lowrank.compat.unsloth import trainer

        return getattr(trainer, name)
    if name in _ELSEWHERE:
        raise ImportError(f"{name}: {_ELSEWHERE[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


trl_arguments.install()

__all__ = [
    "FastLanguageModel",
    "FastModel",
    "FastVisionModel",
    "PatchDPOTrainer",
    "PatchFastRL",
    "SamplingParams",
    "UnslothVisionDataCollator",
    "apply_chat_template",
    "check_python_modules",
    "create_locked_down_function",
    "execute_with_time_limit",
    "get_chat_template",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "is_port_open",
    "launch_openenv",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
]

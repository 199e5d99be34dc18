"""Which of transformers' classes a configuration is loaded as: one answer for loading, planning, export and cards.

A composite model (a language model with a tower for pictures or sound) is loaded whole, as those who serve it load it:
then an adapter's names fit there. transformers' own `AutoModelForCausalLM` knows few of them, and of some it takes the
language model alone, whose layers have other names.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as MULTIMODAL,
)

_OWN_CODE = "AutoModelForCausalLM"


def is_composite(config: Any) -> bool:
    """Whether a configuration (transformers') holds that of a language model beside others."""
    return config.get_text_config() is not config


def has_language_model(config: Any) -> bool:
    """Whether there is a class for it that writes text: transformers', or one that its own code names."""
    return config.model_type in CAUSAL or config.model_type in MULTIMODAL or names_own_code(config)


def model_class(config: Any) -> Any:
    """transformers' auto class for a configuration, with `from_config` and `from_pretrained`."""
    kind = config.model_type
    own = names_own_code(config) and not type(config).__module__.startswith("transformers.")
    if kind in MULTIMODAL and not own and (is_composite(config) or kind not in CAUSAL):
        return transformers.AutoModelForMultimodalLM
    return transformers.AutoModelForCausalLM


def names_own_code(config: Any) -> bool:
    """Whether it brings a causal language model of its own code."""
    return _OWN_CODE in (getattr(config, "auto_map", None) or {})

"""Rotary embeddings stretched, so that a base reads longer documents than it was made for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from lowrank.errors import ModelError
from lowrank.settings import Settings


class RopeScaling(Settings):
    """How far and how."""

    type: Literal["linear", "yarn", "llama3"] = "yarn"
    """linear: positions divided by the factor (arXiv:2306.15595). yarn: fast rotations kept, slow ones divided
    (arXiv:2309.00071). llama3: as Llama 3.1 did it."""
    factor: float = Field(gt=1)
    """How many times as long the longest document is."""

    @field_validator("type", mode="before")
    @classmethod
    def _not_dynamic(cls, value: Any) -> Any:
        if value == "dynamic":
            raise ValueError(
                "dynamic scaling looks at the longest document of a pass, so documents would change one another; "
                "use yarn"
            )
        return value


def stretch(config: Any, scaling: RopeScaling | None) -> None:
    """Put `scaling` into a transformers configuration. ModelError where it has no plain rotary embedding."""
    if scaling is None:
        return
    text = config.get_text_config()
    old = getattr(text, "rope_parameters", None)
    if not isinstance(old, dict) or "rope_theta" not in old:
        raise ModelError(f"model.rope_scaling: {config.model_type} has no rotary embedding that could be stretched")
    if old.get("rope_type", "default") != "default":
        raise ModelError(
            f"model.rope_scaling: this base is stretched already (rope_type {old['rope_type']} in its config.json); "
            "leave rope_scaling out"
        )
    before = text.max_position_embeddings
    new = {**old, "rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type != "linear":
        new["original_max_position_embeddings"] = before
    if scaling.type == "llama3":
        new |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    text.rope_parameters = new
    text.max_position_embeddings = int(before * scaling.factor)


def describe(config: Any, scaling: RopeScaling) -> str:
    """For a person, of a stretched configuration."""
    positions = config.get_text_config().max_position_embeddings
    return (
        f"the rotary embedding is stretched ({scaling.type}, factor {scaling.factor:g}): documents of up to "
        f"{positions} tokens can be read. An adapter does not carry this: whoever loads it gives the "
        "base the same rope_parameters; a merged or fully tuned model has them in its config.json"
    )

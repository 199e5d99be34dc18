"""The language model in a transformers model, its stack of decoder layers, and the backbone without the head.

A composite model has towers beside it (pictures, sound) that have layers too. No list of families: the language model
is where the embedding of tokens is.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lowrank.errors import ModelError


def language_model(model: Any) -> tuple[str, Any]:
    """(full name, module) of the smallest transformers model in a composite one that has the embedding of tokens in it;
    the head may be outside. A model that is no composite is its own language model, under the empty name."""
    found: tuple[str, Any] = "", model
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return found
    from transformers import PreTrainedModel  # here, since settings are read without models' code

    embedding = model.get_input_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and any(each is embedding for each in module.modules()):
            found = name, module  # a model comes before those in it
    return found


def causal_lms(model: Any) -> list[Any]:
    """The model, and the transformers models within it that contain both the token embedding and the head."""
    from transformers import PreTrainedModel

    parts = {model.get_input_embeddings(), model.get_output_embeddings()}
    return [
        module
        for module in model.modules()
        if module is model or (isinstance(module, PreTrainedModel) and parts <= set(module.modules()))
    ]


def is_outside(name: str, language: str) -> bool:
    """Whether a layer of this full name is outside of the language model `language`: in a tower or a projector, or the
    head."""
    return language != "" and name != language and not name.startswith(f"{language}.")


LANGUAGE, TOWER, PROJECTOR, SOUND = "language_model", "vision_tower", "multi_modal_projector", "sound"


class Parts:
    """Which part of a model its layers are in, by their full names; no list of families.

    The tower is the stack of layers beside the language model and what embeds pictures for it; the projector what else
    is beside it. A model without a tower is its own language model.
    """

    def __init__(self, model: Any) -> None:
        from transformers import PreTrainedModel
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.language, head = language_model(model)[0], model.get_output_embeddings()
        self._head = next((name for name, module in model.named_modules() if module is head), None)
        outside = [(name, each) for name, each in model.named_modules() if self.is_outside(name)]
        self._blocks = tuple(f"{name}." for name, each in outside if isinstance(each, GradientCheckpointingLayer))
        towers = [name for name, each in outside if isinstance(each, PreTrainedModel)]
        self._towers = tuple(f"{name}." for name in towers if not self.language.startswith(f"{name}."))

    @property
    def has_tower(self) -> bool:
        """Whether there are layers beside the language model."""
        return bool(self._blocks)

    def is_outside(self, name: str) -> bool:
        """Whether it is in a tower or a projector."""
        return is_outside(name, self.language) and name != self._head and not self.language.startswith(f"{name}.")

    def of(self, name: str) -> str:
        """LANGUAGE, TOWER, PROJECTOR, or SOUND for what is none of them by its name."""
        if not self.is_outside(name):
            return LANGUAGE
        if "audio" in name:
            return SOUND
        tower = next((each for each in self._towers if name.startswith(each)), None)
        embeds = tower is not None and "embed" in name.removeprefix(tower)
        return TOWER if embeds or name.startswith(self._blocks) else PROJECTOR


def decoder_layers(model: Any) -> nn.ModuleList | None:
    """The one list of decoder layers of the language model; None where there is none, or several."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    stacks = [
        module
        for module in language_model(model)[1].modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(each, GradientCheckpointingLayer) for each in module)
    ]
    return stacks[0] if len(stacks) == 1 else None


def find_backbone(model: Any) -> nn.Module:
    """What transformers calls the base model; where a family forgot to say, the part that has the embedding in it."""
    if model.base_model is not model:
        return model.base_model
    language, module = language_model(model)
    if language:
        return module
    embedding = model.get_input_embeddings()
    for child in model.children():
        if child is not embedding and any(module is embedding for module in child.modules()):
            return child
    raise ModelError(f"{type(model).__name__}: lowrank cannot tell the backbone of this model from its head")

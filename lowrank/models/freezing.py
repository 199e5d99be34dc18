"""`tuning: freeze`: some decoder layers of the base are trained, the rest stays as it is.

Names are LLaMA-Factory's. Layers spread evenly over the model are what LLaMA Pro trains (arXiv:2401.02415): the blocks
that `lowrank expand` inserted.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lowrank.errors import ModelError, did_you_mean, raise_all
from lowrank.models.config import FreezeConfig
from lowrank.models.layers import decoder_layers, is_outside, language_model


def chosen_layers(config: FreezeConfig, num_layers: int) -> list[int]:
    """Places of the layers that are trained. ModelError where there are not so many, or they do not spread evenly."""
    number = config.trainable_layers
    if abs(number) > num_layers or (number == 0 and not config.extra_modules):
        raise ModelError(f"freeze.trainable_layers: {number} of {num_layers} layers; choose 1 to {num_layers}")
    if not config.spread:
        return list(range(num_layers - number, num_layers)) if number >= 0 else list(range(-number))
    if number <= 0 or num_layers % number:
        raise ModelError(
            f"freeze.trainable_layers: {number} layers cannot be spread evenly over {num_layers}; give the number that "
            "`lowrank expand` inserted"
        )
    stride = num_layers // number
    return list(range(stride - 1, num_layers, stride))


def train_everything(model: Any) -> str | None:
    """Set `requires_grad` of every parameter of the language model. A sentence about towers for pictures or sound: they
    stay as they are; None where there are none."""
    model.requires_grad_(True)
    language, own = language_model(model)[0], _of_head(model)
    kept: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if is_outside(name, language) and id(parameter) not in own:
            parameter.requires_grad_(False)
            part = name.removeprefix(f"{language.rpartition('.')[0]}.").partition(".")[0]
            kept[part] = kept.get(part, 0) + parameter.numel()
    if not kept:
        return None
    parts = ", ".join(f"{name} ({count:,} weights)" for name, count in kept.items())
    return f"the language model is trained; what this base has beside it for what is not text stays: {parts}"


def _of_head(model: Any) -> set[int]:
    """Identities of the parameters of its head, which lies beside the language model of a composite one."""
    head = model.get_output_embeddings()
    return {id(parameter) for parameter in head.parameters()} if head is not None else set()


def train_only(model: Any, config: FreezeConfig) -> list[str]:
    """Set `requires_grad` of every parameter; the names of those that are trained. ModelError for unknown modules."""
    layers = decoder_layers(model)
    if layers is None:
        raise ModelError(f"tuning: freeze: {type(model).__name__} has no one stack of decoder layers; use full")
    chosen = [layers[index] for index in chosen_layers(config, len(layers))]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    parts = dict.fromkeys(name for layer in layers for name, _ in layer.named_children())
    beside = [(name, each) for name, each in model.named_parameters() if id(each) not in inside]
    language, own = language_model(model)[0], _of_head(model)  # nobody trains a tower so: it has no gradients
    beside = [(name, each) for name, each in beside if id(each) in own or not is_outside(name, language)]
    others = {name.split(".")[-2]: None for name, _ in beside}
    problems = [
        f"freeze.trainable_modules: a decoder layer has no {name!r}{did_you_mean(name, parts)}"
        for name in config.trainable_modules
        if name != "all" and name not in parts
    ]
    problems += [
        f"freeze.extra_modules: outside its layers the language model has no {name!r}{did_you_mean(name, others)}"
        for name in config.extra_modules
        if name not in others
    ]
    raise_all(ModelError, "these parts of the base cannot be trained", problems)
    model.requires_grad_(False)
    for layer in chosen:
        _train_parts(layer, config.trainable_modules)
    for name, parameter in beside:
        if name.split(".")[-2] in config.extra_modules:
            parameter.requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _train_parts(layer: nn.Module, names: tuple[str, ...]) -> None:
    for name, child in layer.named_children():
        if "all" in names or name in names:
            child.requires_grad_(True)

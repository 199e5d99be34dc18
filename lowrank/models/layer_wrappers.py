"""Methods that put a forward pass of their own around decoder layers, with parameters of their own: the seam for them.

A method is one file of lowrank/contrib/layer_wrappers, found by its name, or a third party's `my_module:MyWrapper`: a
`LayerWrapperConfig` that wraps a model's layers and returns a `LayerWrapper`, which `Base` tells of every forward pass.
Nothing in the core knows one of them by name. What holds for all: wrapped layers are trained whole (`tuning: full`) and
packed, they may compute otherwise in training than afterwards, and no other program runs them.

A trained one is saved with the model: its parameters have names of their own among the model's, and config.json has
its settings under its type's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn

from lowrank.errors import ModelError, raise_all
from lowrank.settings import Settings, choice_of, configs_in

if TYPE_CHECKING:
    from lowrank.models.loading.checkpoint_files import StoredTensor

SETTING = "model.layer_wrapper"
_PACKAGE = "lowrank.contrib.layer_wrappers"


class LayerWrapper(Protocol):
    """The wrapped layers of one model."""

    @property
    def added(self) -> Sequence[nn.Module]:
        """The modules it put on the model: what it trains besides the layers."""
        ...

    def draw(self) -> None:
        """Fresh parameters for these, the same on every device."""
        ...

    def begin(self, training: bool, num_tokens: int | None = None, tokens_of_step: int = 1) -> None:
        """A forward pass begins. In training: of `num_tokens` rows that are no filler, in an optimizer step of
        `tokens_of_step` in all. What it keeps holds until the backward pass has ended."""
        ...

    def reproducible(self) -> AbstractContextManager[None]:
        """Inside, nothing hangs on rounding: for the tests of a loaded model, which read it in pieces and whole."""
        ...


class LayerWrapperConfig(Settings):
    """What every method's settings offer, besides `type`."""

    title: ClassVar[str]
    """A wrapped model and what is special about its layers, for messages: `a NAME: its layers do this`."""
    parameters: ClassVar[str]
    """A part of the names of all parameters it adds, between dots."""

    def wrap(self, model: Any) -> LayerWrapper:
        """Wrap the model's layers, with parameters drawn anew. ModelError for a model that has none to wrap."""
        raise NotImplementedError

    @property
    def saved(self) -> dict[str, Any]:
        """What config.json keeps."""
        return self.model_dump(exclude={"type"})


if TYPE_CHECKING:
    LayerWrapperChoice = LayerWrapperConfig
else:
    LayerWrapperChoice = choice_of(
        _PACKAGE, default="", page="lowrank/models/layer_wrappers.py", base=LayerWrapperConfig
    )


def saved_wrapper(config: Any) -> LayerWrapperConfig | None:
    """How the layers of a checkpoint are wrapped, by its config.json (transformers' object or a copy of it)."""
    for name, kind in configs_in(_PACKAGE).items():
        content = getattr(config, name, None)
        if content is not None:
            return kind.model_validate(content)  # pyright: ignore[reportReturnType]
    return None


def refuse_wrapped(config: Any, why: str) -> None:
    """ModelError if `config` (transformers' or a copy of it) is of a wrapped model."""
    found = saved_wrapper(config)
    if found is not None:
        raise ModelError(
            f"this model is {found.title}, and {why}. Use it with chat, serve, predict and eval, or take the base it "
            "was made from"
        )


def wrap(model: Any, config: LayerWrapperConfig) -> LayerWrapper:
    """Wrap the layers anew, and have config.json say so."""
    wrapper = config.wrap(model)
    setattr(model.config, str(getattr(config, "type", "")), config.saved)
    return wrapper


def wrapped_as_planned(model: Any, config: LayerWrapperConfig | None) -> LayerWrapper | None:
    """The wrapper that a run with these settings will have, before any weights are there."""
    config = config or saved_wrapper(model.config)
    return None if config is None else wrap(model, config)


def attach(model: Any, config: LayerWrapperConfig | None, stored: Mapping[str, StoredTensor]) -> LayerWrapper | None:
    """The wrapper that config.json speaks of, with its parameters from `stored`, or a fresh one as `config`; None where
    neither wants any. ModelError for both, or where parameters are missing."""
    saved = saved_wrapper(model.config)
    if saved is None:
        return config and wrap(model, config)
    if config is not None and config != saved:
        raise ModelError(f"{SETTING}: this model is converted already ({saved.saved}); leave the setting out")
    wrapper = wrap(model, saved)
    named = {name: value for name, value in model.named_parameters() if f".{saved.parameters}." in name}
    problems = [f"{name}: not in the checkpoint" for name in named if name not in stored]
    raise_all(ModelError, f"config.json says that this is {saved.title}, but its parameters are not there", problems)
    with torch.no_grad():
        for name, value in named.items():
            value.copy_(stored[name].read())
    return wrapper


def wrapping_conflicts(*, trains_all: bool, storage: str, packed: bool, compares: str | None) -> Iterator[str]:
    """What cannot be done with wrapped layers, asked for or found in a base's config.json. `compares`: an objective
    that compares log-probabilities in training with others."""
    if not trains_all:
        yield f"{SETTING}: it is trained together with the layers; set tuning: full, or take another base"
    if storage != "dense":
        yield f"{SETTING}: needs model.storage.type: dense, not {storage!r}"
    if not packed:
        yield f"{SETTING}: only where attention is packed and whole; leave model.attention and model.shift_attn out"
    if compares is not None:
        yield (
            f"{SETTING}: objective {compares} compares log-probabilities in training with others, which these layers "
            "give otherwise, so it would learn the difference between the two; choose sft, pretrain or orpo"
        )


def is_added(name: str) -> bool:
    """Whether a tensor of a checkpoint is a method's own."""
    return any(f".{getattr(kind, 'parameters', '')}." in name for kind in configs_in(_PACKAGE).values())

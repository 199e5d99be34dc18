"""Activation checkpointing (gradient checkpointing): which activations a decoder layer keeps, and which it recomputes.

    none       keep them
    selective  keep the attention's result, compute the rest again
    full       keep the layer's input alone, compute the layer again
    sqrt       keep the input of every sqrt(n)-th layer alone
    offload    keep them in host memory (GPU only)

The graph of autograd is the same under every policy and so is every bit of the gradient; only where the
saved tensors come from differs. transformers hands each decoder layer's call to a function of ours
(`GradientCheckpointingLayer`); no model code is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from lowrank.errors import ModelError
from lowrank.models.checkpointing.activation_offload import HostMemory
from lowrank.models.checkpointing.sqrt_checkpointing import Segments
from lowrank.models.layers import language_model

_CHECKS_BEFORE_HOOKS = "__call__" in vars(GradientCheckpointingLayer)
"""Older releases of transformers ask in the layer's `__call__`, which its own hooks come too late for."""

Run = Callable[..., Any]
"""`run(function, *args)`: what `function(*args)` gives, with the saved tensors of its graph under some policy."""


def set_activation_checkpointing(model: Any, policy: str | int) -> None:
    """Put `policy` on the decoder layers: a name from above for all of them, or n: the first n `full`. Layers
    of a tower are `full` where all decoder layers keep less than everything.

    May be called again with another policy. ModelError where the model has no layers that could, or for `offload` on
    a CPU.
    """
    inside = set(language_model(model)[1].modules())
    layers = _layers(model, policy)
    decoder = [layer for layer in layers if layer in inside]
    owners = _owners(model)
    for layer, run in zip(decoder, _runs(model, policy, len(decoder))):
        _use(layer, run, owners)
    keeps = isinstance(policy, int) or policy in ("none", "auto")
    for layer in layers:
        if layer not in inside:
            _use(layer, None if keeps else partial(_of_tower, layer), owners)


def set_activation_checkpointing_under(model: Any, remembered: Callable[[], AbstractContextManager[Any]]) -> None:
    """Policy `full` for a trainer that is not ours, which may change what layers look at before the backward pass.

    `remembered()` is called with each layer's first computation; the second runs within what it gave. The state of
    torch's generator is kept too, for a base that has dropout of its own.
    """

    def run(function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), remembered()))

    owners = _owners(model)
    for layer in _layers(model, "full"):
        _use(layer, run, owners)


def _layers(model: Any, policy: str | int) -> list[Any]:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers and policy not in ("none", "auto", 0):
        raise ModelError(
            f"model.activation_checkpointing: {type(model).__name__} does not support it; leave it at none"
        )
    return layers


def _runs(model: Any, policy: str | int, num_layers: int) -> list[Run | None]:
    """How each layer is run; None: as it is."""
    if isinstance(policy, int):
        return [_full if index < policy else None for index in range(num_layers)]
    if policy in ("none", "auto"):  # what `auto` means is decided before a model is loaded (planning/)
        return [None] * num_layers
    if policy == "full":
        return [_full] * num_layers
    if policy == "selective":
        return [_selective] * num_layers
    if policy == "sqrt":
        return Segments(segment_length(num_layers)).runs(num_layers)
    if policy != "offload":
        raise ModelError(
            f"model.activation_checkpointing: {policy!r} is not a policy; none, selective, full, sqrt, offload"
        )
    if model.get_input_embeddings().weight.device.type == "cpu":
        raise ModelError(
            "model.activation_checkpointing: offload moves activations from a GPU to host memory, and this base is in "
            "host memory "
            "already; use selective, full or sqrt"
        )
    return [HostMemory(model).run] * num_layers


def segment_length(num_layers: int) -> int:
    """Layers between two kept inputs under `sqrt`."""
    return max(1, math.isqrt(max(0, num_layers - 1)) + 1)


def _full(function: Callable[..., Any], *args: Any) -> Any:
    # the base has no random numbers of its own, so there is no state to keep
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _of_tower(layer: torch.nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """`full`, of a tower's layer with adapters in it: it computes one document of one slot, and when it is computed
    again, what its adapters look at is the whole batch."""
    routing: Any = next((each.routing for each in layer.modules() if hasattr(each, "routing")), None)
    if routing is None:
        return _full(function, *args)
    context = routing.current
    contexts = lambda: (nullcontext(), routing.using(context))  # noqa: E731  # torch's name for a function of two
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _selective(function: Callable[..., Any], *args: Any) -> Any:
    contexts = partial(create_selective_checkpoint_contexts, _keep_attention)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The fused attention kernels of all devices, by torch's naming; attention written out is computed again."""
    del context, args, kwargs
    name = str(operator)
    kept = ("attention" in name and "backward" not in name) or "varlen_attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _owners(model: Any) -> list[torch.nn.Module]:
    """The modules that have decoder layers in them and are called before these; none where the layers' hooks do."""
    if not _CHECKS_BEFORE_HOOKS:
        return []
    return [
        module
        for module in model.modules()
        if not isinstance(module, GradientCheckpointingLayer)
        and any(isinstance(each, GradientCheckpointingLayer) for each in module.modules())
    ]


def _use(layer: Any, run: Run | None, owners: Sequence[torch.nn.Module]) -> None:
    """Let transformers call `run`, when the layer is called with gradients.

    transformers asks `layer.training` whether to, and then also drops caches and activates dropout. So it is true from
    the moment the layer (in older releases: an owner of it) is called with gradients until the layer has asked, and at
    no other time.
    """
    for hook in getattr(layer, "_lowrank_hooks", ()):
        hook.remove()
    layer._lowrank_hooks = ()
    layer.gradient_checkpointing = run is not None
    if run is None:
        return

    def start(function: Callable[..., Any], *args: Any) -> Any:
        layer.training = False
        return run(function, *args)

    layer._gradient_checkpointing_func = start
    called = owners or (layer,)
    layer._lowrank_hooks = tuple(module.register_forward_pre_hook(partial(_enable, layer)) for module in called)


def _enable(layer: torch.nn.Module, module: torch.nn.Module, args: Any) -> None:
    del module, args
    layer.training = torch.is_grad_enabled()

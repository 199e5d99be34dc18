"""What each decoder layer does with its activations between the forward and the backward pass.

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
from collections.abc import Callable
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
from lowrank.models.offload import HostMemory
from lowrank.models.segment import Segments

Run = Callable[..., Any]
"""`run(function, *args)`: what `function(*args)` gives, with the saved tensors of its graph under some policy."""


def set_recompute(model: Any, policy: str | int) -> None:
    """Put `policy` on the decoder layers: a name from above for all of them, or n: the first n `full`.

    May be called again with another policy. ModelError where the model has no layers that could, or for `offload` on
    a CPU.
    """
    layers = _layers(model, policy)
    for layer, run in zip(layers, _runs(model, policy, len(layers))):
        _use(layer, run)


def set_recompute_under(model: Any, remembered: Callable[[], AbstractContextManager[Any]]) -> None:
    """Policy `full` for a trainer that is not ours, which may change what layers look at before the backward pass.

    `remembered()` is called with each layer's first computation; the second runs within what it gave. The state of
    torch's generator is kept too, for a base that has dropout of its own.
    """

    def run(function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), remembered()))

    for layer in _layers(model, "full"):
        _use(layer, run)


def _layers(model: Any, policy: str | int) -> list[Any]:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers and policy not in ("none", "auto", 0):
        raise ModelError(f"model.recompute: {type(model).__name__} does not support it; leave it at none")
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
        raise ModelError(f"model.recompute: {policy!r} is not a policy; none, selective, full, sqrt, offload")
    if model.get_input_embeddings().weight.device.type == "cpu":
        raise ModelError(
            "model.recompute: offload moves activations from a GPU to host memory, and this base is in host memory "
            "already; use selective, full or sqrt"
        )
    return [HostMemory(model).run] * num_layers


def segment_length(num_layers: int) -> int:
    """Layers between two kept inputs under `sqrt`."""
    return max(1, math.isqrt(max(0, num_layers - 1)) + 1)


def _full(function: Callable[..., Any], *args: Any) -> Any:
    # the base has no random numbers of its own, so there is no state to keep
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _selective(function: Callable[..., Any], *args: Any) -> Any:
    contexts = partial(create_selective_checkpoint_contexts, _keep_attention)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The fused attention kernels of all devices, by torch's naming; attention written out is computed again."""
    del context, args, kwargs
    name = str(operator)
    kept = ("attention" in name and "backward" not in name) or "varlen_attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _use(layer: Any, run: Run | None) -> None:
    """Let transformers call `run`, when the layer is called with gradients.

    transformers asks `layer.training` whether to, and then also drops caches and activates dropout. So it is true from
    the moment the layer is called with gradients until the layer has asked, and at no other time.
    """
    hook = getattr(layer, "_lowrank_asks", None)
    if hook is not None:
        hook.remove()
        layer._lowrank_asks = None
    layer.gradient_checkpointing = run is not None
    if run is None:
        return

    def start(function: Callable[..., Any], *args: Any) -> Any:
        layer.training = False
        return run(function, *args)

    layer._gradient_checkpointing_func = start
    layer._lowrank_asks = layer.register_forward_pre_hook(_ask)


def _ask(module: torch.nn.Module, args: Any) -> None:
    del args
    module.training = torch.is_grad_enabled()

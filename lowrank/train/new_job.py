"""Training state of a new job: its parameters, master weights, value head and optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from lowrank.adapters.bank import Bank
from lowrank.batches import BASE_SLOT
from lowrank.errors import ModelError
from lowrank.kernels.counter_random import key_of
from lowrank.kernels.precision import float32_or_wider
from lowrank.models.base import Base
from lowrank.objectives import Objective, needs
from lowrank.train.layerwise import LayerwiseUpdates
from lowrank.train.loss_scale import scale_for
from lowrank.train.mixed_precision import MasterWeights
from lowrank.train.optimizers import BlockwiseOptimizer, OptimizerConfig
from lowrank.train.trained_job import TrainedJob

VALUE_HEAD = "value_head"
"""The name of a job's value head among its parameters."""
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def new_job(
    base: Base,
    bank: Bank,
    slot: int,
    objective: Objective,
    settings: OptimizerConfig,
    *,
    seed: int,
    neftune_alpha: float,
    num_steps: int | None,
    notify: Callable[[str], None],
) -> TrainedJob:
    """Return the training state of `slot` of the bank (BASE_SLOT: the base's own parameters that are not frozen).
    `notify` is called with notes about the optimizer. ModelError for settings that this base cannot be trained with."""
    masters, trainable = None, {}
    if slot == BASE_SLOT:
        trainable = {name: value for name, value in base.model.named_parameters() if value.requires_grad}
        masters = MasterWeights(trainable, settings.is_blockwise)
        parameters, refresh, factors = masters.parameters, masters.refresh, None
    else:
        parameters, refresh = bank.parameters(slot), partial(bank.refresh, slot)
        factors = bank.learning_rate_factors(slot, settings.learning_rate)
    if neftune_alpha:
        bank.enable_noise()
    with_head = needs(objective, "value") or needs(objective, "token_values")
    value_D = _fresh_value_head(base, seed) if with_head else None
    if value_D is not None:
        parameters = {**parameters, VALUE_HEAD: value_D}
        factors = factors and [*factors, 1.0]
    optimizer = settings.build(parameters, factors, _undecayed(parameters, base.model), base.head_dim)
    if masters is not None and isinstance(optimizer, BlockwiseOptimizer):
        optimizer.set_block_callback(masters.train)
    for note in settings.notes(base.device):
        notify(note)
    scale, layerwise = scale_for(base.dtype), None
    if masters is not None and settings.layerwise:
        if scale is not None:
            raise ModelError(
                "optimizer.layerwise: float16 gradients are scaled until the whole step is known to be finite; set "
                "model.dtype: bfloat16, or leave layerwise out"
            )
        receiving = trainable if value_D is None else {**trainable, VALUE_HEAD: value_D}
        layerwise = LayerwiseUpdates(receiving, parameters, optimizer, masters.write_back)
    return TrainedJob(
        objective,
        parameters,
        optimizer,
        settings,
        refresh,
        num_steps,
        seed,
        neftune_alpha,
        value_D,
        scale,
        layerwise,
    )


def _undecayed(names: Iterable[str], model: nn.Module) -> set[str]:
    """Return the parameters without weight decay: norms and biases, by the rule of transformers' Trainer. `names`:
    parameters of `model`, or of adapters on it, which are matched by name or by belonging to a `LayerNorm`."""
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    return {name for name in names if _UNDECAYED.search(name.lower()) or name.rpartition(".")[0] in norms}


def _fresh_value_head(base: Base, seed: int) -> torch.nn.Parameter:
    """Return a new value head, (D) float32 or wider, initialized like the head of a sequence classifier in
    transformers."""
    std = getattr(base.model.config.get_text_config(), "initializer_range", None) or 0.02
    generator = torch.Generator().manual_seed(key_of(seed, VALUE_HEAD))
    value_D = std * torch.randn(base.hidden_size, generator=generator)
    return torch.nn.Parameter(value_D.to(base.device, float32_or_wider(base.dtype)))

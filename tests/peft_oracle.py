"""The peer: PEFT's own adapter on a copy of the model, started from our values, and the loss as everybody writes it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from lowrank.segments import Segment


def trainable(twin: Any) -> dict[str, torch.nn.Parameter]:
    """A PEFT model's trainable tensors by our names."""
    return {
        name.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".default", ""): parameter
        for name, parameter in twin.named_parameters()
        if parameter.requires_grad
    }


def peft_twin(
    model: Any, ours: Mapping[str, torch.Tensor], **settings: Any
) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """PEFT's LoRA on `model` with our values, and its trainable tensors by our names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about tied weights and its own settings
        twin = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False).eval()
    theirs = trainable(twin)
    shapes = [{name: value.shape for name, value in tensors.items()} for tensors in (ours, theirs)]
    assert shapes[0] == shapes[1]
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    return twin, theirs


def types_of(segment: Segment, prompt_type: int = 0) -> torch.Tensor:
    """(1, L) `token_type_ids`: `prompt_type` until the first learned token, then the other. 0 is PaliGemma's."""
    learned_1L = (torch.from_numpy(segment.weight_L)[None] != 0).long().cummax(dim=1).values
    return learned_1L if prompt_type == 0 else 1 - learned_1L


def plain_loss(model: Any, segments: Sequence[Segment], prompt_type: int | None = None) -> torch.Tensor:
    """One document at a time, full logits. `prompt_type`: see `types_of`; None: the model is told of no prompts."""
    total = sum(float(segment.weight_L.sum()) for segment in segments)
    loss = torch.zeros((), dtype=torch.float64)
    for segment in segments:
        token_T = torch.from_numpy(segment.token_L)
        types = {} if prompt_type is None else {"token_type_ids": types_of(segment, prompt_type)}
        logprob_TV = model(input_ids=token_T[None], **types).logits[0].double().log_softmax(-1)
        logprob_T = logprob_TV[:-1].gather(1, token_T[1:, None])[:, 0]
        loss = loss - (logprob_T * torch.from_numpy(segment.weight_L[1:])).sum() / total
    return loss

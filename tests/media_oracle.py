"""Losses of documents with media, one at a time, by the whole of transformers' model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from lowrank.segments import Segment
from tests.peft_oracle import types_of


def alone_loss(twin: Any, base: Any, segments: Sequence[Segment]) -> torch.Tensor:
    """One document at a time, media and all, through the whole of transformers' model. `twin`: PEFT's."""
    total = sum(float(segment.weight_L.sum()) for segment in segments)
    loss = torch.zeros((), dtype=torch.float64)
    takes = inspect.signature(type(twin.base_model.model).forward).parameters
    for segment in segments:
        token_T = torch.from_numpy(segment.token_L.astype("int64"))
        given = {
            name: base.media_encoder.types(token_T[None], name) for name in ("mm_token_type_ids", "token_type_ids")
        }
        if base.prompt_type is not None:
            given["token_type_ids"] = types_of(segment)
        given |= {"attention_mask": torch.ones_like(token_T)[None]}
        if segment.media is not None:
            inputs = base.media_encoder.processor.inputs(segment.media.items)
            given |= {
                name: value.to(base.dtype) if value.is_floating_point() and "second" not in name else value
                for name, value in inputs.items()
                if name not in ("input_ids", *given)
            }
        given = {name: value for name, value in given.items() if name in takes}
        logprob_TV = twin(input_ids=token_T[None], **given).logits[0].double().log_softmax(-1)
        logprob_T = logprob_TV[:-1].gather(1, token_T[1:, None])[:, 0]
        loss = loss - (logprob_T * torch.from_numpy(segment.weight_L[1:])).sum() / total
    return loss

"""A hook on the language model of a composite model: reads the token embeddings that it is called with, into which the
model has put features of sounds, and writes such features into the embeddings of a stream of many documents.

Families compute features of sounds in ways of their own, and scatter them over the embeddings of their placeholders. So
each document's sounds go through the whole front of transformers' model, up to its language model, and no line
here is of one family.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Mapping
from functools import partial
from typing import Any

import torch

_EMBEDDINGS = "inputs_embeds"


class _Reached(Exception):
    """Ends a forward pass where it calls the language model."""

    def __init__(self, embedding: torch.Tensor) -> None:
        super().__init__("the language model is reached")
        self.embedding = embedding


class EmbeddingHookError(RuntimeError):
    """The language model is not called with embeddings."""


class EmbeddingHook:
    """Hooks the call of `language`, the language model in `backbone`."""

    def __init__(self, backbone: Any, language: Any) -> None:
        self._backbone, self._language = backbone, language
        self.forward_parameters = frozenset(inspect.signature(backbone.forward).parameters)
        """What the backbone's forward call may be given."""

    def embeddings(self, token_1L: torch.Tensor, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(L, D) embeddings that the language model is called with for one document of these tokens. `given`: the
        tensors of its media. Raises EmbeddingHookError."""
        position_1L = torch.arange(token_1L.shape[1], device=token_1L.device)[None]
        hook = self._language.register_forward_pre_hook(_capture, with_kwargs=True)
        try:
            self._backbone(
                input_ids=token_1L, attention_mask=torch.ones_like(token_1L), position_ids=position_1L, use_cache=False,
                **given,
            )  # fmt: skip
        except _Reached as reached:
            return reached.embedding[0]
        finally:
            hook.remove()
        raise EmbeddingHookError("its language model is not handed embeddings of tokens by a call")

    @contextlib.contextmanager
    def injecting(self, row_K: torch.Tensor, feature_KD: torch.Tensor) -> Generator[None]:
        """Around a forward call: the embeddings at rows `row_K` of all its tokens in a line become `feature_KD`."""
        hook = self._language.register_forward_pre_hook(partial(_inject, row_K, feature_KD), with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def _capture(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    del module, args
    if kwargs.get(_EMBEDDINGS) is None:
        raise EmbeddingHookError(f"its language model is called without {_EMBEDDINGS}")
    raise _Reached(kwargs[_EMBEDDINGS])


def _inject(
    row_K: torch.Tensor, feature_KD: torch.Tensor, module: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    del module
    embedding = kwargs.get(_EMBEDDINGS)
    if embedding is None:
        raise EmbeddingHookError(f"its language model is called without {_EMBEDDINGS}")
    flat_ND = embedding.reshape(-1, embedding.shape[-1])
    flat_ND = flat_ND.index_copy(0, row_K, feature_KD.to(flat_ND.dtype))
    return args, {**kwargs, _EMBEDDINGS: flat_ND.view_as(embedding)}

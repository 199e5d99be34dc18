"""Where a composite model hands its language model the embeddings of a text: what it made of sounds is taken from
there, and put back there into a stream of many documents.

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
    """Ends a forward pass at the language model."""

    def __init__(self, embedding: torch.Tensor) -> None:
        super().__init__("the language model is reached")
        self.embedding = embedding


class NoEntrance(RuntimeError):
    """The language model is not handed embeddings."""


class Entrance:
    """The front of a backbone. `language`: the language model in it."""

    def __init__(self, backbone: Any, language: Any) -> None:
        self._backbone, self._language = backbone, language
        self.takes = frozenset(inspect.signature(backbone.forward).parameters)
        """What the backbone's forward call may be given."""

    def embeddings(self, token_1L: torch.Tensor, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(L, D): what the language model is handed for one document of these tokens, with tensors of its media."""
        place_1L = torch.arange(token_1L.shape[1], device=token_1L.device)[None]
        hook = self._language.register_forward_pre_hook(_leave, with_kwargs=True)
        try:
            self._backbone(
                input_ids=token_1L, attention_mask=torch.ones_like(token_1L), position_ids=place_1L, use_cache=False,
                **given,
            )  # fmt: skip
        except _Reached as reached:
            return reached.embedding[0]
        finally:
            hook.remove()
        raise NoEntrance("its language model is not handed embeddings of tokens by a call")

    @contextlib.contextmanager
    def putting_in(self, row_K: torch.Tensor, feature_KD: torch.Tensor) -> Generator[None]:
        """Around a forward call: its rows `row_K`, of all tokens in a line, are handed on as `feature_KD`."""
        hook = self._language.register_forward_pre_hook(partial(_put_in, row_K, feature_KD), with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def _leave(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    del module, args
    if kwargs.get(_EMBEDDINGS) is None:
        raise NoEntrance(f"its language model is called without {_EMBEDDINGS}")
    raise _Reached(kwargs[_EMBEDDINGS])


def _put_in(
    row_K: torch.Tensor, feature_KD: torch.Tensor, module: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    del module
    embedding = kwargs.get(_EMBEDDINGS)
    if embedding is None:
        raise NoEntrance(f"its language model is called without {_EMBEDDINGS}")
    flat_ND = embedding.reshape(-1, embedding.shape[-1])
    flat_ND = flat_ND.index_copy(0, row_K, feature_KD.to(flat_ND.dtype))
    return args, {**kwargs, _EMBEDDINGS: flat_ND.view_as(embedding)}

"""Mixture-of-Depths (arXiv:2404.02258): some decoder layers see only some tokens of a document, others pass by.

A converted layer has a router, which gives every token a score. In training the k tokens of a document with the highest
scores (a share of it, `capacity`) go through the layer, as a shorter document with the places they had. What comes back
is added times 2 sigmoid(score), so that a router that knows nothing yet leaves the layer as it was and learns which
tokens gain by it.

Whether a token is among the k best is not known before the document ends. So a second row of numbers, the predictor,
learns from the router's choices (the paper's own way), from what it is given alone, and decides in evaluation
and generation. There a layer's keys and values are those of its own tokens, in the pages that the sequence has anyway.

Layers stay the model's own: they are called with fewer rows. Routers are saved in the model's safetensors as
`model.layers.N.depth_router.*`, and config.json has `mixture_of_depths`; no other program reads them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowrank.contrib.layer_wrappers.mixture_of_depths import ROUTER
from lowrank.devices import to_device
from lowrank.errors import ModelError
from lowrank.kernels.precision import float32_or_wider
from lowrank.models.attention.packed import Packed
from lowrank.models.attention.paged import PagedBatch
from lowrank.models.layer_wrappers import SETTING
from lowrank.models.layers import decoder_layers

_STD = 0.02


class DepthRouter(nn.Module):
    """Scores a layer's tokens, and predicts its own choices."""

    def __init__(self, number: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.number = number
        """Of its converted layer, counted from 0."""
        self.score_D = nn.Parameter(torch.empty(width, dtype=dtype, device=device))
        self.predictor_D = nn.Parameter(torch.empty(width, dtype=dtype, device=device))
        self.predictor_bias = nn.Parameter(torch.empty(1, dtype=dtype, device=device))

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Fresh numbers, the same on every device."""
        drawn_2D = _STD * torch.randn(2, len(self.score_D), generator=torch.Generator().manual_seed(seed))
        self.score_D.copy_(drawn_2D[0])
        self.predictor_D.copy_(drawn_2D[1])
        self.predictor_bias.zero_()

    def scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T) float32 or wider."""
        unit_TD = _unit(x_TD)
        return unit_TD @ self.score_D.to(unit_TD.dtype)

    def predictions(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T): above 0 where a token is expected among the best. Its gradient ends here."""
        unit_TD = _unit(x_TD.detach())
        return unit_TD @ self.predictor_D.to(unit_TD.dtype) + self.predictor_bias.to(unit_TD.dtype)


def _unit(x_TD: torch.Tensor) -> torch.Tensor:
    """Of root mean square 1, so that routers learn as fast in every layer of every model."""
    return F.rms_norm(x_TD.to(float32_or_wider(x_TD.dtype)), x_TD.shape[-1:], eps=1e-6)


@dataclass(frozen=True)
class _Part:
    """The K rows of a call that go through a layer, and how documents lie in them."""

    index_K: torch.Tensor
    stream: Packed | PagedBatch


@dataclass(frozen=True)
class _Pass:
    """What a converted layer must know of the pass it is in; layers that are computed again read it again."""

    learning: bool = False
    num_tokens: int | None = None
    tokens_of_step: int = 1


class Depths:
    """The converted layers of a model."""

    def __init__(self, capacity: float, routers: dict[int, DepthRouter]) -> None:
        self.capacity = capacity
        self.routers = routers
        """By number of the layer."""
        self._pass = _Pass()
        self._by_place = False

    @property
    def added(self) -> list[DepthRouter]:
        """The routers."""
        return list(self.routers.values())

    def draw(self) -> None:
        """Each its own."""
        for index, router in self.routers.items():
            router.draw(index)

    @contextlib.contextmanager
    def reproducible(self) -> Generator[None, None, None]:
        """Two of three tokens go through, other ones in every layer, by their places: for tests of the loaded model,
        where rounding must not decide who goes."""
        self._by_place = True
        try:
            yield
        finally:
            self._by_place = False

    def begin(self, training: bool, num_tokens: int | None = None, tokens_of_step: int = 1) -> None:
        """A forward pass. In training the best tokens go through and the predictors learn which those were, from the
        first `num_tokens` rows, their losses divided by the tokens of all passes of the step; else the predicted
        ones go."""
        self._pass = _Pass(training, num_tokens, tokens_of_step)

    def part(self, router: DepthRouter, layer: nn.Module, x_TD: torch.Tensor, stream: Any) -> _Part | None:
        """Who goes through a layer; None: nobody."""
        if self._pass.learning and isinstance(stream, Packed):
            return self._best(router.scores(x_TD), stream)
        if isinstance(stream, PagedBatch):
            predicted_T = self._predicted(router, x_TD[: stream.num_own], stream)
            own = stream.part(layer, predicted_T)
            return own and _Part(predicted_T.nonzero()[:, 0], own)
        if not isinstance(stream, Packed):
            raise ModelError(f"mixture of depths: no tokens can be chosen in {type(stream).__name__}")
        predicted_T = self._predicted(router, x_TD, stream)
        lengths = [count for part in predicted_T.split(stream.lengths) if (count := int(part.sum()))]
        return _Part(predicted_T.nonzero()[:, 0], _packed(lengths, x_TD.device)) if lengths else None

    def _predicted(self, router: DepthRouter, x_TD: torch.Tensor, stream: Packed | PagedBatch) -> torch.Tensor:
        if not self._by_place:
            return router.predictions(x_TD) > 0
        if isinstance(stream, PagedBatch):
            place_T = stream.position_T[: stream.num_own]
        else:
            place_T = torch.cat([torch.arange(length, device=x_TD.device) for length in stream.lengths])
        return (place_T + router.number) % 3 > 0

    def _best(self, score_T: torch.Tensor, stream: Packed) -> _Part:
        rows, start = [], 0
        for length in stream.lengths:
            best_K = score_T[start : start + length].topk(share_of(length, self.capacity)).indices
            rows.append(start + best_K.sort().values)
            start += length
        return _Part(torch.cat(rows), _packed([len(each) for each in rows], score_T.device))

    def taught(
        self, router: DepthRouter, x_TD: torch.Tensor, index_K: torch.Tensor, output_1TD: torch.Tensor
    ) -> torch.Tensor:
        """The output, with the predictor's loss in its backward pass."""
        if not (self._pass.learning and torch.is_grad_enabled()):
            return output_1TD
        own = slice(self._pass.num_tokens)
        predicted_T = router.predictions(x_TD)
        chosen_T = torch.zeros_like(predicted_T).index_fill(0, index_K, 1.0)
        wrong = F.binary_cross_entropy_with_logits(predicted_T[own], chosen_T[own], reduction="sum")
        return _WithLoss.apply(output_1TD, wrong, 1.0 / self._pass.tokens_of_step)  # pyright: ignore[reportReturnType]


def _packed(lengths: list[int], device: torch.device) -> Packed:
    return Packed(to_device(torch.tensor([0, *lengths]).cumsum(0).int(), device), tuple(lengths))


def share_of(length: int, capacity: float) -> int:
    """k of a document."""
    return max(1, round(capacity * length))


def convert(model: Any, capacity: float, every: int) -> Depths:
    """Put routers, drawn anew, on every `every`-th layer of the one stack of decoder layers; its first stays whole.

    ModelError where there is no such stack.
    """
    layers = decoder_layers(model)
    if layers is None or every > len(layers):
        found = "no one stack of decoder layers" if layers is None else f"{len(layers)} layers"
        raise ModelError(f"{SETTING}: {type(model).__name__} has {found}, so every: {every} names none")
    weight = model.get_input_embeddings().weight
    width = model.config.get_text_config().hidden_size
    routers = {}
    for index in range(every - 1, len(layers), every):
        routers[index] = DepthRouter(len(routers), width, weight.dtype, weight.device)
    depths = Depths(capacity, routers)
    depths.draw()
    for index, router in routers.items():
        layers[index] = _converted(layers[index], depths, router)
    return depths


class _DepthLayer:
    """What a converted layer has before its own class: the forward pass over its own tokens."""

    depths: Depths

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own; its first argument (1, T, D), with `packed` among the others."""
        layer: Any = self
        router = getattr(layer, ROUTER)
        x_1TD, num_rows = hidden_states, hidden_states.shape[1]
        with torch.no_grad():
            part = self.depths.part(router, layer, x_1TD[0], kwargs.get("packed"))
        if part is None:
            return x_1TD
        index_K = part.index_K
        given = {name: _rows(value, index_K, num_rows) for name, value in kwargs.items()} | {"packed": part.stream}
        x_1KD = x_1TD.index_select(1, index_K)
        whole: Any = super()
        result = whole.forward(x_1KD, *(_rows(value, index_K, num_rows) for value in args), **given)
        y_1KD = result[0] if isinstance(result, tuple) else result
        gate_K1 = (2.0 * torch.sigmoid(router.scores(x_1KD[0])))[:, None].to(x_1TD.dtype)
        output_1TD = x_1TD.index_add(1, index_K, (y_1KD - x_1KD) * gate_K1)
        return self.depths.taught(router, x_1TD[0], index_K, output_1TD)


@functools.cache
def _converted_class(kind: type[nn.Module]) -> type[Any]:
    """A family's decoder layer that sees only some tokens: everything else about it, names too, is the family's."""
    return type(f"Depth{kind.__name__}", (_DepthLayer, kind), {})


def _converted(layer: nn.Module, depths: Depths, router: DepthRouter) -> nn.Module:
    """The layer as one of such a class, with a router; it has the layer's own parts."""
    kind = _converted_class(type(layer))
    converted: Any = object.__new__(kind)  # without its constructor: the parts are there
    vars(converted).update(vars(layer))
    converted.depths = depths
    converted.add_module(ROUTER, router)
    return converted


def _rows(value: Any, index_K: torch.Tensor, num_rows: int) -> Any:
    """An argument of the layer for these rows: what has one entry for each token ((1, T, ...)) is cut."""
    if isinstance(value, tuple):
        return tuple(_rows(each, index_K, num_rows) for each in value)
    if isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[:2] == (1, num_rows):
        return value.index_select(1, index_K)
    return value


class _WithLoss(torch.autograd.Function):
    """`output` as it is, with a loss of its own that reaches the backward pass by it, also of a layer that is
    computed again."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor, weight: float) -> torch.Tensor:
        ctx.weight = torch.full_like(loss, weight)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:
        return outer[0], ctx.weight, None

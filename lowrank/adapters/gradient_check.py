"""Is the gradient through a frozen layer right, whatever it has been through? Asked of every storage, at run time too.

Two well-known libraries repack their weights in the first evaluation pass and train on wrong gradients from then on,
one without a word (docs/footguns.md). So the question is asked after an evaluation, with recomputation, with another
layer in between (packed layers share one scratch buffer), with adapters and without. The answer is compared with the
layer's own dense weight, in float64 on the processor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank.adapters.linear import LayerAdapter, RoutedLinear
from lowrank.adapters.routing import ForwardContext, Routing
from lowrank.adapters.variants.lora import Lora
from lowrank.kernels.precision import float32_or_wider
from lowrank.models.storages import BaseLinear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest relative error of a product in each dtype; a wrong gradient is wrong by tenths."""
_TOKENS, _RANK, _SCALE = 24, 4, 0.5
_RANGES = ((0, 2, 11), (1, 11, _TOKENS))
"""Rows 0 and 1 are the bare base's; two adapters have the others."""


def gradient_errors(base: BaseLinear, other: BaseLinear, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """{situation: largest relative error of y, dx, dA, dB}. `other`: a layer that runs between forward and backward."""
    weight_OD = base.dense_weight().cpu().double().clone()
    bias = getattr(base, "bias", None)
    generator = torch.Generator().manual_seed(0)
    layer, masters = _routed(base, dtype, generator, device)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    x_TD, dy_TO = draw(_TOKENS, base.in_features), draw(_TOKENS, base.out_features)

    def measure(run: Callable[[torch.Tensor], torch.Tensor], trained: list[torch.Tensor]) -> float:
        own = x_TD.clone().requires_grad_()
        y_TO = run(own)
        other(torch.zeros(1, other.in_features, dtype=dtype, device=device))
        got = [y_TO.detach(), *torch.autograd.grad(y_TO, [own, *trained], dy_TO)]
        wide = x_TD.cpu().double().requires_grad_()
        copies = [tensor.detach().to(dtype).cpu().double().requires_grad_() for tensor in trained]
        expected_y = nn.functional.linear(wide, weight_OD, None if bias is None else bias.cpu().double())
        if trained:
            parts = [
                _SCALE * wide[first:end] @ copies[2 * index].t() @ copies[2 * index + 1].t()
                for index, (_, first, end) in enumerate(_RANGES)
            ]
            expected_y = expected_y + torch.cat([torch.zeros_like(expected_y[: _RANGES[0][1]]), *parts])
        expected = [expected_y.detach(), *torch.autograd.grad(expected_y, [wide, *copies], dy_TO.cpu().double())]
        return max(_relative(one, two) for one, two in zip(got, expected))

    def evaluate() -> None:
        layer.eval()
        with torch.inference_mode():
            layer(x_TD)
        with torch.no_grad():
            base(x_TD[:1])  # one row: where those libraries take their other path
        layer.train()

    errors = {"trained": measure(layer, masters), "without adapters": measure(base, [])}
    evaluate()
    errors["after an evaluation"] = measure(layer, masters)
    errors["without adapters, after an evaluation"] = measure(base, [])
    errors["recomputed"] = measure(lambda x: checkpoint(layer, x, use_reentrant=False), masters)
    errors["recomputed, without adapters"] = measure(lambda x: checkpoint(base, x, use_reentrant=False), [])
    return errors


def _routed(
    base: BaseLinear, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> tuple[RoutedLinear, list[torch.Tensor]]:
    """The layer with two adapters that are not at their start, and their trained tensors in order."""
    layer = RoutedLinear(base, "canary", Routing(ForwardContext(_TOKENS, _RANGES)))
    wide = float32_or_wider(dtype)
    trained: list[torch.Tensor] = []
    for slot, _, _ in _RANGES:
        masters = {
            "lora_A": nn.Parameter(torch.randn(_RANK, base.in_features, generator=generator).to(device, wide)),
            "lora_B": nn.Parameter(torch.randn(base.out_features, _RANK, generator=generator).to(device, wide)),
        }
        layer.adapters[slot] = LayerAdapter(Lora(), _SCALE, {**masters})
        trained += masters.values()
    return layer, trained


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.cpu().double() - other).norm() / other.norm()).item()

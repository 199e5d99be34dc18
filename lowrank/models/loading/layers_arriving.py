"""Decoder layers of a model that is being loaded, handed on one by one as soon as all of their weights are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from lowrank.errors import ModelError
from lowrank.models.layers import decoder_layers
from lowrank.models.loading.expert_loading import with_packed_experts

if TYPE_CHECKING:
    from lowrank.models.loading.quantize_on_load import Packing


class LayersArriving:
    """Notices when all weights of a decoder layer are there, while the loader goes through the checkpoint in the order
    of its names, and hands the layer on."""

    def __init__(self, arrived: Callable[[nn.Module], None]) -> None:
        self._arrived = arrived
        self._model: Any = None
        self._waiting: list[tuple[str, nn.Module]] = []

    def begin(self, model: Any) -> None:
        """The model is on the meta device. ModelError if it has no stack of decoder layers."""
        layers = decoder_layers(model)
        if layers is None:
            raise ModelError(
                f"{type(model).__name__} has no stack of decoder layers that could be kept in parts; set base: "
                "replicated"
            )
        names = {module: name for name, module in model.named_modules()}
        self._model, self._waiting = model, [(names[layer], layer) for layer in layers]

    def waits_for(self, name: str) -> bool:
        """Whether the module of this full name is in a layer that is still to be handed on."""
        return any(name.startswith(f"{layer}.") for layer, _ in self._waiting)

    def look(self, packing: Packing, at_the_end: bool = False) -> None:
        """Hand on what is complete: the next layer, or at the end every one that is left."""
        while self._waiting and _is_complete(packing, *self._waiting[0]):
            self._hand_on(packing, self._waiting.pop(0))
        if at_the_end:
            for each in self._waiting:
                if _is_complete(packing, *each):  # what is not, the loader is about to name
                    self._hand_on(packing, each)

    def _hand_on(self, packing: Packing, named: tuple[str, nn.Module]) -> None:
        name, layer = named
        put_packed(packing, self._model, f"{name}.")
        self._arrived(layer)


def _is_complete(packing: Packing, name: str, layer: nn.Module) -> bool:
    """Every parameter has its values, or is packed."""
    for own, parameter in layer.named_parameters():
        full = f"{name}.{own}"
        if parameter.is_meta and full.rpartition(".")[0] not in packing.packed:
            experts = packing.experts.get(full)
            if experts is None or experts.done is None:
                return False
    return True


def put_packed(packing: Packing, model: Any, prefix: str = "") -> None:
    """Packed layers whose names begin so take their places."""
    for name in [each for each in packing.packed if each.startswith(prefix)]:
        model.set_submodule(name, packing.packed.pop(name))
    modules = {name: each for name, each in packing.modules_of_experts.items() if name.startswith(prefix)}
    with_packed_experts(model, modules, packing.experts)
    for name in modules:
        del packing.modules_of_experts[name]

"""Settings of Mixture-of-Depths (lowrank/contrib/mixture_of_depths.py)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from lowrank.models.layer_wrappers import LayerWrapper, LayerWrapperConfig

ROUTER = "depth_router"


class MixtureOfDepthsConfig(LayerWrapperConfig):
    """Of every second layer only an eighth of a document's tokens, chosen by a router, takes part. A half-converted
    model answers badly until it is trained on a lot of text."""

    type: Literal["mixture_of_depths"] = "mixture_of_depths"
    """Mixture-of-Depths: which layers see how much of a document (arXiv:2404.02258)."""
    capacity: float = Field(default=0.125, gt=0, lt=1)
    """The share of a document's tokens that goes through a converted layer."""
    every: int = Field(default=2, ge=2)
    """Every so many-th layer is converted."""

    title: ClassVar[str] = "a mixture of depths: some of its layers see only some tokens"
    parameters: ClassVar[str] = ROUTER

    def wrap(self, model: Any) -> LayerWrapper:
        """Put routers on the layers."""
        from lowrank.contrib.mixture_of_depths import convert  # settings are read where no model is loaded

        return convert(model, self.capacity, self.every)

"""The peak of each phase of a training pass, as tensors come and go."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from dataclasses import dataclass

from lowrank.planning.live_bytes import LiveBytes
from lowrank.planning.pictures import PlannedMediaEncoder


@dataclass(frozen=True)
class StepTrace:
    """Bytes of tensors seen in one simulated step. The phases are peaks above what lives between steps."""

    base: int
    adapters: int
    optimizer: int
    gradients: int
    """After the last forward pass of the step."""
    earlier: int
    """Those of them that the passes before this one have left."""
    kept: int
    """What the backbone's graph keeps for the backward pass."""
    forward: int
    loss: int
    backward: int
    pixels: int = 0
    """Pictures made ready for the tower."""
    tower_kept: int = 0
    """What the tower leaves for the rest of the pass: features, and what its graph keeps. A part of `kept`."""
    tower: int = 0
    """The peak while it looks."""
    tower_backward: int = 0
    """The peak of its part of the backward pass."""

    def plus(self, other: StepTrace, times: int) -> StepTrace:
        """Each number plus `times` the other's."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
        return StepTrace(*(one + times * two for one, two in pairs))


class Peaks:
    """The peak of each phase of a training pass, and what is alive after the first."""

    def __init__(self, live: LiveBytes, media_encoder: PlannedMediaEncoder | None = None) -> None:
        self._live, self._media_encoder = live, media_encoder
        self.bytes: list[int] = []
        self.after_forward = 0

    @contextlib.contextmanager
    def forward(self) -> Generator[None, None, None]:
        """The forward pass runs inside: its peak, and what is alive behind it."""
        with self._phase():
            yield
        self.after_forward = self._live.now

    def loss(self) -> contextlib.AbstractContextManager[None]:
        """The loss is computed inside: its peak."""
        return self._phase()

    @contextlib.contextmanager
    def backward(self) -> Generator[None, None, None]:
        """The backward pass runs inside: its peak."""
        with self._phase():
            yield
        if self._media_encoder is not None:
            self.bytes[-1] = self._media_encoder.of_language(self.bytes[-1])

    @contextlib.contextmanager
    def _phase(self) -> Generator[None, None, None]:
        with self._live.phase() as phase:
            yield
        self.bytes.append(phase.bytes)

"""What has been measured so far, on disk at every moment, and how much time is left."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_day.device import Device


@dataclass
class Day:
    """One run. Every `add` and `note` is written at once, so that a cut leaves what was measured."""

    device: Device
    folder: Path
    seconds: float
    tiny: bool = False
    """A rehearsal: tiny shapes, one of each."""
    peers: bool = True
    """Whether TRL has its turns."""
    cells: int | None = None
    """At most so many points of a table; None: all."""
    dtype: torch.dtype = torch.bfloat16
    result: dict[str, Any] = field(default_factory=dict)
    _started: float = field(default_factory=time.perf_counter)
    _section_ends: float = 0.0

    @property
    def left(self) -> float:
        """Seconds of the whole."""
        return self.seconds - (time.perf_counter() - self._started)

    def begin(self, seconds: float) -> None:
        """A section that may take so long."""
        self._section_ends = time.perf_counter() + min(seconds, self.left)

    def over(self) -> bool:
        """Whether the section's time is."""
        return time.perf_counter() >= self._section_ends

    def set(self, key: str, value: Any) -> None:
        """One thing that was found."""
        self.result[key] = value
        self.write()

    def add(self, key: str, value: Any) -> None:
        """One more of a list."""
        self.result.setdefault(key, []).append(value)
        self.write()

    def note(self, text: str) -> None:
        """What a reader should know."""
        print(text, flush=True)
        self.add("notes", text)

    def write(self) -> None:
        """JSON, and the page made of it."""
        from benchmarks.gpu_day.page import page

        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("gpu_day.json", json.dumps(self.result, indent=1, default=str)),
            ("gpu_day.md", page(self.result)),
        ):
            partial = self.folder / f"{name}.partial"
            partial.write_text(text + "\n")
            os.replace(partial, self.folder / name)

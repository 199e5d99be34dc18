"""The forms a model can be exported in: one file each, found by its name.

A target file has a settings class with `type` whose `build()` returns an `ExportTarget`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank.export import ExportTarget
from lowrank.settings import Settings, choice_of

if TYPE_CHECKING:

    class TargetConfig(Settings):
        """What every target's settings class offers."""

        type: str

        def build(self) -> ExportTarget: ...
else:
    TargetConfig = choice_of(__name__, default="merged", page="docs/add-an-export-target.md")

"""Where a model is by its name, without torch: a base that ships with the package, or a hub that is no transformers'
own."""

from __future__ import annotations

from pathlib import Path

from lowrank.models import modelscope_hub

TINY = "lowrank/tiny"
"""The base of the demo, the examples and the tests."""
PACKAGED = {TINY: "tiny", "lowrank/tiny-vision": "tiny_vision"}
"""Bases that ship with the package, and their folders beside this file. The second sees (examples/tiny-vision)."""


def locate(path: str) -> str:
    """The folder of a packaged model or of one on ModelScope's hub, or `path` as it is. ModelError from that hub."""
    if path in PACKAGED:
        return str(Path(__file__).parent / PACKAGED[path])
    if modelscope_hub.is_wanted() and modelscope_hub.is_name(path):
        return modelscope_hub.folder_of(path)
    return path

"""The part of a `ServeEngine` (engine.py) that follows from the renderers by which its models read conversations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from lowrank.data.chat.rendering import Renderer
from lowrank.errors import ModelError


class ReadsByRenderer(ABC):
    """For engines that make tokens of a conversation themselves."""

    @abstractmethod
    def _renderer_of(self, name: str) -> Renderer: ...

    def chat_template(self, name: str) -> str:
        """The one it was trained with."""
        try:
            return self._renderer_of(name).chat_template
        except ModelError:
            return ""

    def chat_variables(self, name: str) -> Mapping[str, Any]:
        """Of the settings it was trained with."""
        return self._renderer_of(name).config.chat_template_kwargs

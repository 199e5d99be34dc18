"""What the browser sends with a change."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

_DEEPEST = 32
"""No settings are nested as deeply."""


class BoardRequest(BaseModel):
    """JSON with exactly these keys; any other is refused, and so is text that no file could hold."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise ValueError("half a character, or nested too deeply") from None
        level = [value]
        for _ in range(_DEEPEST):
            level = [item for each in level for item in _inside(each)]
        if level:
            raise ValueError(f"nested more than {_DEEPEST} levels deep")
        return value


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []

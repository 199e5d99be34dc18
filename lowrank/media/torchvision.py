"""torchvision, which is optional: transformers resizes videos by it, and some families' pictures."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache


@cache
def torchvision_problem() -> str | None:
    """Why it cannot be imported, in words; None: it can."""
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed"
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        return f"the installed torchvision is made for another torch than the one here ({error})"
    return None

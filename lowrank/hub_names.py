"""Names of repositories on a hub (huggingface.co, ModelScope): owner/name, by the rules of huggingface_hub."""

from __future__ import annotations

import re

_PART = r"\w[\w.-]{0,95}"
_HUB_NAME = re.compile(rf"(?!.*\.\.){_PART}/{_PART}")
_REPOSITORY = re.compile(rf"(?!.*\.\.)({_PART}/)?{_PART}")


def is_hub_name(text: str) -> bool:
    """Whether `text` has the form owner/name; a relative path of two parts may have it too."""
    return _HUB_NAME.fullmatch(text) is not None


def is_repository_name(text: str) -> bool:
    """Whether `text` has the form of a name on the hub: owner/name, or one of the old names without an owner (gpt2)."""
    return _REPOSITORY.fullmatch(text) is not None

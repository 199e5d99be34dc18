"""Names of repositories on a hub (huggingface.co, ModelScope): owner/name, by the rules of huggingface_hub."""

from __future__ import annotations

import re

_HUB_NAME = re.compile(r"(?!.*\.\.)\w[\w.-]{0,95}/\w[\w.-]{0,95}")


def is_hub_name(text: str) -> bool:
    """Whether `text` has the form owner/name; a relative path of two parts may have it too."""
    return _HUB_NAME.fullmatch(text) is not None

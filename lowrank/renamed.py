"""Settings and options that had other names: who says the old one is refused with the new one in the message."""

from __future__ import annotations

from typing import Any

RENAMED: dict[str, str] = {
    "model.recompute": "model.activation_checkpointing",
    "model.lean": "model.memory_efficient_modules",
    "model.mixture_of_depths": "model.layer_wrapper",
}
"""Old -> new, each from the top of the file or of an entry of `jobs`."""

RENAMED_OPTIONS: dict[str, dict[str, str]] = {
    "serve": {
        "resident": "max_loras",
        "at_once": "max_num_seqs",
        "cache_tokens": "kv_cache_tokens",
    },
}
"""By command: old -> new, as keywords of its function in Python; `--max-loras` on its command line."""


def new_name(path: tuple[Any, ...]) -> str | None:
    """What the setting at `path` is called now; None for one that never had another name."""
    inside = path[2:] if path[:1] == ("jobs",) and len(path) > 2 else path
    return RENAMED.get(".".join(map(str, inside)))

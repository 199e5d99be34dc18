"""Where adapters may come from: nothing outside the folders that were named is ever read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank.checkpoints.atomic import current
from lowrank.checkpoints.peft_layout import CONFIG_FILE
from lowrank.errors import did_you_mean
from lowrank.serve.refusal import Refusal


def adapter_in(place: Path) -> Path | None:
    """`place`, or its best or last, whichever holds an adapter first; a folder that is being replaced counts."""
    candidates = (place, place / "best", place / "last")
    return next((folder for folder in candidates if (current(folder) / CONFIG_FILE).is_file()), None)


def adapters_in(root: Path) -> dict[str, Path]:
    """Every adapter folder in `root`, by its name."""
    return {path.name: place for path in sorted(root.iterdir()) if (place := adapter_in(path)) is not None}


def adapter_within(roots: Sequence[Path], path: str) -> Path:
    """The adapter folder that a client's `path` names, within the resolved `roots`. Refusal for any other."""
    try:
        found = [(root / path).resolve() for root in roots]
    except (OSError, ValueError, RuntimeError):
        found = []
    within = [place for place in found if any(place.is_relative_to(root) for root in roots)]
    if not within:
        folders = ", ".join(map(str, roots)) or "none: start with --adapters DIR"
        raise Refusal(400, f"path {path!r} is outside the folders adapters may come from ({folders})", param="path")
    for place in within:
        folder = adapter_in(place)
        if folder is not None and any(folder.resolve().is_relative_to(root) for root in roots):
            return folder
    raise Refusal(400, f"path {path!r} holds no adapter ({CONFIG_FILE}, there or in best/ or last/)", param="path")


def unknown_model(name: str, names: Sequence[str]) -> Refusal:
    """What to raise for a name that is not there: it says which are."""
    there = ", ".join(names[:20]) + (f" and {len(names) - 20} more (GET /v1/models)" if len(names) > 20 else "")
    hint = did_you_mean(name, names) if len(names) > 20 else ""
    message = f"there is no model {name!r} here{hint}; there are {there}"
    return Refusal(404, message, code="model_not_found", param="model")

"""Where adapters may come from: nothing outside the folders that were named is ever read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank.checkpoints.adapter_folder import CONFIG_FILE, adapter_in
from lowrank.errors import did_you_mean
from lowrank.serve.api.http_errors import ApiError


def adapter_within(roots: Sequence[Path], path: str) -> Path:
    """The adapter folder that a client's `path` names, within the resolved `roots`. ApiError for any other."""
    try:
        found = [(root / path).resolve() for root in roots]
    except (OSError, ValueError, RuntimeError):
        found = []
    within = [place for place in found if any(place.is_relative_to(root) for root in roots)]
    if not within:
        folders = ", ".join(map(str, roots)) or "none: start with --adapters DIR"
        raise ApiError(400, f"path {path!r} is outside the folders adapters may come from ({folders})", param="path")
    for place in within:
        folder = adapter_in(place)
        if folder is not None and any(folder.resolve().is_relative_to(root) for root in roots):
            return folder
    raise ApiError(400, f"path {path!r} holds no adapter ({CONFIG_FILE}, there or in best/ or last/)", param="path")


def unknown_model(name: str, names: Sequence[str]) -> ApiError:
    """The error for an unknown name, which lists the known ones."""
    there = ", ".join(names[:20]) + (f" and {len(names) - 20} more (GET /v1/models)" if len(names) > 20 else "")
    hint = did_you_mean(name, names) if len(names) > 20 else ""
    message = f"there is no model {name!r} here{hint}; there are {there}"
    return ApiError(404, message, code="model_not_found", param="model")

"""Uploading an export to the Hugging Face hub. The token comes from the environment and is never shown or stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub

from lowrank.errors import ConfigError, OutputError, first_line
from lowrank.hub_names import is_hub_name

_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def check_push(name: str | None, targets: Sequence[str], *, dry_run: bool) -> dict[str, str]:
    """The repository of each target: `owner/name`, or `owner/name-TARGET` where there are several.

    Before any work: ConfigError for a name that is none, or where the environment has no token.
    """
    if name is None:
        return {}
    if not is_hub_name(name):
        raise ConfigError(f"--push {name}: expected owner/name")
    if not dry_run and _token() is None:
        raise ConfigError(f"--push: set {_TOKENS[0]} to a token of the hub that may write to {name}")
    return {target: name if len(targets) == 1 else f"{name}-{target}" for target in targets}


def push_folder(
    folder: Path, name: str, *, dry_run: bool, private: bool = True, commit_message: str | None = None, **upload: Any
) -> dict[str, Any]:
    """Upload a folder as one commit; a new repository is private. `upload`: more of huggingface_hub's upload_folder
    (commit_description, revision, create_pr). OutputError if the hub refuses."""
    url = f"{huggingface_hub.constants.ENDPOINT}/{name}"
    if dry_run:
        return {"repository": name, "url": url, "files": 0, "dry_run": True}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    api = huggingface_hub.HfApi(token=_token())
    try:
        api.create_repo(name, private=private, exist_ok=True)
        message = commit_message or "Exported by lowrank"
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, **upload)
    except Exception as error:  # the hub's client passes on the errors of whichever HTTP library it uses
        raise OutputError(f"{name}: the hub refuses the upload ({_describe(error)}); {folder} is complete") from error
    return {"repository": name, "url": url, "files": len(files), "dry_run": False}


def _token() -> str | None:
    return next((os.environ[name] for name in _TOKENS if os.environ.get(name)), None)


def _describe(error: Exception) -> str:
    """Its first line, should it ever hold the token without it."""
    token, text = _token(), first_line(error, most=None)
    return text.replace(token, "***") if token else text

"""What a path names: a run, one of its checkpoints or jobs, an adapter, a model, a GGUF file, or a name on the hub.

Every command that takes a model uses this, so that all accept the same paths. It reads only file names and a run's
config.json, without torch, since the board uses it for folders, too.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import huggingface_hub

from lowrank.checkpoints.adapter_folder import CONFIG_FILE, JOB_FOLDERS, is_adapter
from lowrank.checkpoints.run_folder import CONFIG as RUN_CONFIG
from lowrank.checkpoints.steps import STATE_FILE
from lowrank.errors import ModelError
from lowrank.foreign_files import read_json
from lowrank.hub_names import is_hub_name
from lowrank.hub_reach import hub_or_cache
from lowrank.models import modelscope_hub

_MODEL_CONFIG = "config.json"
_ADAPTER_FILES = [
    "adapter*", "value_head*", "*.jinja", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.model",
    "vocab*", "merges.txt",
]  # fmt: skip


class ArtifactKind(Enum):
    """What a path names."""

    RUN = "a run"
    CHECKPOINT = "a checkpoint of a run"
    JOB = "a job of a run"
    ADAPTER = "an adapter"
    MODEL = "a model"
    GGUF = "a GGUF file"


@dataclass(frozen=True)
class Resolved:
    """A path that was resolved to what it names."""

    path: str
    """The path as it was given."""
    kind: ArtifactKind
    folder: Path
    """The run's folder for a run, its checkpoints and its jobs; an adapter's folder, in the hub's cache for one of the
    hub; a hub model's name; a GGUF file."""
    checkpoint: Path | None = None
    job: str | None = None
    """The job that is named, or whose adapter is."""

    @property
    def of_run(self) -> bool:
        """Whether `folder` is the folder of a run."""
        return self.kind in (ArtifactKind.RUN, ArtifactKind.CHECKPOINT, ArtifactKind.JOB)

    @property
    def name(self) -> str:
        """The name of an adapter or model: of an adapter in a run's folder that of its job. Others' is taken from the
        path, since folders in the hub's cache are named by commits."""
        if self.kind is ArtifactKind.ADAPTER and self.job is not None:
            return self.job
        return Path(self.path).name or self.folder.resolve().name or self.path


def resolve(path: str, *, revision: str | None = None) -> Resolved:
    """Resolve what `path` names. A hub name is looked up there, or in the cache: an adapter is downloaded, at
    `revision`; any other name is taken for a model. ModelError for a text that can be neither a path nor such a
    name."""
    folder = Path(path)
    _refuse_no_path(path)
    if is_gguf(path):
        return Resolved(path, ArtifactKind.GGUF, folder)
    if is_run(folder):
        return Resolved(path, ArtifactKind.RUN, folder)
    if is_adapter(folder):
        return Resolved(path, ArtifactKind.ADAPTER, folder, job=_job_of_adapter(folder.resolve()))
    whole = folder.resolve()
    if (folder / STATE_FILE).is_file() and is_run(whole.parent.parent):
        return Resolved(path, ArtifactKind.CHECKPOINT, whole.parent.parent, checkpoint=folder)
    if not (folder / RUN_CONFIG).exists() and whole.name in _job_names(whole.parent):
        return Resolved(
            path, ArtifactKind.JOB, folder.parent if folder.name == whole.name else whole.parent, job=whole.name
        )
    cached = on_hub(path, revision)
    return (
        Resolved(path, ArtifactKind.MODEL, folder) if cached is None else Resolved(path, ArtifactKind.ADAPTER, cached)
    )


def is_gguf(path: str) -> bool:
    """Return whether `path` is named like a GGUF file, which llama.cpp runs."""
    return path.endswith(".gguf")


def is_run(folder: Path) -> bool:
    """Return whether `folder` is a run's: its config.json, unlike a model's, has `model` and `output_dir`."""
    return _run_settings(folder) is not None


def on_hub(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of an adapter of the hub, downloaded or in the cache; None if there is no adapter of this
    name. ModelError if the hub cannot be reached and nothing of this name is in the cache."""
    if Path(name).exists() or not is_hub_name(name) or name.startswith("lowrank/"):
        return None
    if modelscope_hub.is_wanted():
        folder = Path(modelscope_hub.folder_of(name, revision))
        return folder if (folder / CONFIG_FILE).is_file() else None
    from huggingface_hub.errors import LocalEntryNotFoundError  # brings a network library along

    def is_cached(file: str) -> bool:
        return isinstance(huggingface_hub.try_to_load_from_cache(name, file, revision=revision), str)

    try:
        if is_cached(_MODEL_CONFIG) and not is_cached(CONFIG_FILE):
            return None  # a model that was downloaded before: where there is no network, nobody waits for one
        with hub_or_cache(name, revision):
            huggingface_hub.hf_hub_download(name, CONFIG_FILE, revision=revision)
            return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_ADAPTER_FILES))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name}: no such folder here; if it is a hub name, check the spelling and the network: the hub does not "
            "give it, and its cache does not have all of it"
        ) from error
    except ModelError:
        raise
    except (OSError, ValueError):  # the hub's own errors are OSErrors
        return None


def _run_settings(folder: Path) -> dict[str, Any] | None:
    try:
        content = read_json(folder / RUN_CONFIG)
    except ModelError:
        return None
    return content if content.keys() >= {"model", "output_dir"} else None


def _job_names(folder: Path) -> list[str]:
    jobs = (_run_settings(folder) or {}).get("jobs")
    named = [job for job in jobs if isinstance(job, dict) and "name" in job] if isinstance(jobs, list) else []
    return [str(job["name"]) for job in named]


def _job_of_adapter(folder: Path) -> str | None:
    """The job whose `best` or `last` this folder is; None for other adapters."""
    job = folder.parent.name
    return job if folder.name in JOB_FOLDERS and job in _job_names(folder.parent.parent) else None


def _refuse_no_path(path: str) -> None:
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES):
            raise ModelError(f"{path[:80]}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ModelError(f"{path[:80]!r}: no path ({error})") from error

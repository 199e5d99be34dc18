"""Models and datasets of ModelScope's hub, through its own package: `USE_MODELSCOPE_HUB=1`, as in LLaMA-Factory.

Names are then those of modelscope.cn; what they name is downloaded, or found in its cache, as a folder.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from lowrank.errors import ModelError
from lowrank.hub_names import is_hub_name

_LATEST = "master"
"""What the hub calls the branch that others call main."""


def is_wanted() -> bool:
    """Whether names are of this hub, by the environment."""
    return os.environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "y", "yes")


def is_name(path: str) -> bool:
    """Whether `path` is a name on a hub rather than something on this machine."""
    return is_hub_name(path) and not Path(path).exists()


@lru_cache(maxsize=64)
def folder_of(name: str, revision: str | None = None, dataset: bool = False) -> str:
    """The folder of a repository, downloaded or in the cache. ModelError without the package, or if the hub refuses."""
    try:
        from modelscope import snapshot_download  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError as error:
        raise ModelError(
            f"{name}: names of ModelScope's hub need its package: pip install 'lowrank-llm[modelscope]'; or leave "
            "USE_MODELSCOPE_HUB out, for those of huggingface.co"
        ) from error
    query = {"revision": revision or _LATEST, "repo_type": "dataset" if dataset else "model"}
    try:
        return str(snapshot_download(name, **query))
    except Exception as error:  # whatever the network or the hub brings
        try:
            return str(snapshot_download(name, **query, local_files_only=True))
        except Exception:
            detail = " ".join(str(error).split())[:200]
            raise ModelError(f"{name}: ModelScope's hub does not give it ({type(error).__name__}: {detail})") from error

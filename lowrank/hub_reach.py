"""Whether the Hugging Face hub answers: one short question, before its own client asks for file after file, each many
times over. The network library is imported where the question is asked."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from lowrank.errors import ModelError
from lowrank.hub_names import is_repository_name

_PATIENCE = 10.0
"""Seconds the hub has to answer."""
_KEPT_SECONDS = 60.0
_answers: dict[str, tuple[float, str | None]] = {}
"""By the hub's address, when it was asked last, and why it did not answer: several parts of a command ask for one
model."""
_ANY_OF = ("config.json", "tokenizer_config.json", "adapter_config.json")


def unreachable(name: str, kind: Literal["models", "datasets"]) -> str | None:
    """Why the hub cannot be asked about the repository `name` of which the cache has nothing, and the way out; None: it
    answers, whatever it says."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and there is no copy of it in the cache"
    checked, why = _answers.get(constants.ENDPOINT, (-_KEPT_SECONDS, None))
    if time.monotonic() - checked > _KEPT_SECONDS:
        why = None
        try:
            get_session().head(f"{constants.ENDPOINT}/api/{kind}/{quote(name)}", timeout=_PATIENCE)
        except Exception as error:  # the client's own errors, by whichever library it has
            why = " ".join(str(error).split())[:120] or type(error).__name__
        _answers[constants.ENDPOINT] = (time.monotonic(), why)
    if why is None:
        return None
    return (
        f"{constants.ENDPOINT} cannot be reached ({why}), and there is no copy of it in the cache; check the network "
        "or HF_ENDPOINT, or download it elsewhere and name its folder"
    )


@contextmanager
def cache_alone() -> Generator[None, None, None]:
    """Let the hub's client and transformers look into the cache and ask nobody."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def hub_or_cache(path: str, revision: str | None = None) -> Generator[None, None, None]:
    """Inside, the files of a model or an adapter are read: of a folder as they are; of a name on the hub from there, or
    from the cache where the hub cannot be reached. ModelError, within seconds, for what is in neither place."""
    if Path(path).exists():
        yield
        return
    if not is_repository_name(path):
        raise ModelError(f"{path}: no such folder here (and no name on the hub, which is of the form owner/name)")
    why = unreachable(path, "models")
    if why is None:
        yield
        return
    if not _in_cache(path, revision):
        raise ModelError(f"{path}: no such folder here; if it is a hub name: {why}")
    with cache_alone():
        yield


def _in_cache(name: str, revision: str | None) -> bool:
    """Whether the cache has something of a repository at this revision."""
    import huggingface_hub

    try:
        found = [huggingface_hub.try_to_load_from_cache(name, file, revision=revision) for file in _ANY_OF]
    except ValueError:  # the hub's own rules for names know more
        return False
    return any(isinstance(each, str) for each in found)

"""What is neither here nor on a hub that answers is said at once, and what the cache has is read from there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import transformers
from huggingface_hub import constants

from lowrank import hub_reach
from lowrank.errors import ModelError
from lowrank.hub_names import is_repository_name
from lowrank.hub_reach import hub_or_cache, unreachable
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load_tokenizer
from lowrank.planning.simulation import read_config

HUB = "https://hub.invalid"


@pytest.fixture(autouse=True)
def questions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a hub that cannot be reached was asked."""
    requested: list[str] = []

    def head(url: str, timeout: float) -> None:
        requested.append(url)
        raise OSError("name or service not known")

    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(constants, "ENDPOINT", HUB)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_reach, "_answers", {})
    return requested


def test_a_hub_is_asked_once_and_says_why_it_is_not_there(questions: list[str]) -> None:
    why = unreachable("me/nope", "models")
    assert why is not None
    assert why.startswith(f"{HUB} cannot be reached (name or service not known), and there is no copy of it in the")
    assert unreachable("me/other", "models") is not None
    assert questions == [f"{HUB}/api/models/me/nope"]


def test_models_are_not_looked_for_where_nothing_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, questions: list[str]
) -> None:
    """Transformers tries for more than a minute, and its retries fill the terminal."""

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("transformers looks for it")

    monkeypatch.chdir(tmp_path)
    for kind in (transformers.AutoTokenizer, transformers.AutoConfig):
        monkeypatch.setattr(kind, "from_pretrained", fail)
    for find in (load_tokenizer, read_config):
        with pytest.raises(ModelError, match=rf"^me/nope: no such folder here; if it is a hub name: {HUB} cannot be"):
            find(ModelConfig(path="me/nope"))
        with pytest.raises(ModelError, match=r"^gpt3: no such folder here; if it is a hub name"):
            find(ModelConfig(path="gpt3"))
    assert len(questions) == 1


@pytest.mark.parametrize("path", ["/abs/nope", "./nope", "a/b/c", "~/model", "my model"])
def test_what_can_be_no_name_on_a_hub_is_a_missing_folder(path: str, questions: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(ModelConfig(path=path))
    assert str(caught.value).startswith(f"{path}: no such folder here")
    assert questions == []
    assert not is_repository_name(path)


def test_what_the_cache_has_is_read_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda name, file, revision: "/x" if file == "config.json" else None
    )
    with hub_or_cache("me/cached"):
        assert huggingface_hub.is_offline_mode()
    assert not huggingface_hub.is_offline_mode()

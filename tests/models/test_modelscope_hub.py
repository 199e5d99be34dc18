"""Names of ModelScope's hub, through its own package and its cache."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from lowrank.compat.llamafactory.dataset_info import sources
from lowrank.errors import ModelError
from lowrank.models import modelscope_hub
from lowrank.models.packaged import TINY, locate


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    modelscope_hub.folder_of.cache_clear()
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")


def test_only_names_go_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saves").mkdir()
    (tmp_path / "saves" / "here").mkdir()
    for path in ("saves/here", str(tmp_path), "./saves/here", "model"):
        assert locate(path) == path
    assert locate(TINY).endswith("tiny")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "0")
    assert locate("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"


@pytest.mark.skipif(importlib.util.find_spec("modelscope") is not None, reason="the package is there")
def test_without_the_package_it_says_what_to_install() -> None:
    with pytest.raises(ModelError, match=r"pip install 'lowrank-llm\[modelscope\]'"):
        locate("Qwen/Qwen3-4B")
    _, problems = sources(["x"], {"x": {"ms_hub_url": "a/b"}}, Path("data"), "sft")
    assert "lowrank-llm[modelscope]" in problems[0]


@pytest.mark.skipif(importlib.util.find_spec("modelscope") is None, reason="needs modelscope")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*MODELSCOPE_DOMAIN.*:FutureWarning")
def test_what_is_in_its_cache_is_found_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "127.0.0.1:9")  # its older name, and what it is since 1.40
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    shutil.copytree(locate(TINY), tmp_path / "models" / "me--tiny" / "snapshots" / "master")
    assert Path(locate("me/tiny"), "config.json").is_file()
    rows = tmp_path / "datasets" / "me--rows" / "snapshots" / "master"
    rows.mkdir(parents=True)
    (rows / "rows.json").write_text("[]")
    (source,), problems = sources(["x"], {"x": {"ms_hub_url": "me/rows"}}, tmp_path, "sft")
    assert (Path(source["path"]), problems) == (rows, [])
    with pytest.raises(ModelError, match="you/gone: ModelScope's hub does not give it"):
        locate("you/gone")

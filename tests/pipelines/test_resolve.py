"""What a path names, by files alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from lowrank import hub_reach
from lowrank.errors import ModelError
from lowrank.pipelines.resolve import ArtifactKind, Resolved, resolve


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of the jobs a and b with a checkpoint; a has a best, b has nothing yet."""
    folder = tmp_path / "run"
    for place in ("a/best", "checkpoints/step-000002/a"):
        (folder / place).mkdir(parents=True)
        (folder / place / "adapter_config.json").write_text("{}")
    settings = {"model": {"path": "x"}, "output_dir": "run", "jobs": [{"name": "a"}, {"name": "b"}]}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "checkpoints/step-000002/state.json").write_text("{}")
    (folder / "predict").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def test_every_kind(run: Path) -> None:
    kinds = {
        "run": ArtifactKind.RUN,
        "run/checkpoints/step-000002": ArtifactKind.CHECKPOINT,
        "run/checkpoints/step-000002/a": ArtifactKind.ADAPTER,
        "run/a": ArtifactKind.JOB,
        "run/b": ArtifactKind.JOB,
        "run/a/best": ArtifactKind.ADAPTER,
        "run/predict": ArtifactKind.MODEL,  # neither a job nor anything else; whoever loads it says so
        "model": ArtifactKind.MODEL,
        "nowhere": ArtifactKind.MODEL,
        "model/f16.gguf": ArtifactKind.GGUF,
    }
    found = {name: resolve(str(run.parent / name)) for name in kinds}
    assert {name: each.kind for name, each in found.items()} == kinds
    assert {name for name, each in found.items() if each.of_run} == {
        "run", "run/a", "run/b", "run/checkpoints/step-000002"
    }  # fmt: skip
    assert all(each.folder == run for each in found.values() if each.of_run)
    assert (found["run/b"].job, found["run"].job) == ("b", None)
    assert found["run/checkpoints/step-000002"].checkpoint == run / "checkpoints/step-000002"


def test_inside_of_what_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "a")
    assert resolve(".") == Resolved(".", ArtifactKind.JOB, run, job="a")
    monkeypatch.chdir(run / "a" / "best")
    assert (resolve(".").kind, resolve(".").name) == (ArtifactKind.ADAPTER, "a")
    monkeypatch.chdir(run / "checkpoints" / "step-000002")
    assert (resolve(".").kind, resolve(".").folder) == (ArtifactKind.CHECKPOINT, run)


def test_a_damaged_config_is_no_run(run: Path) -> None:
    for text in ("{", "[]", '{"model": 1}'):
        (run / "config.json").write_text(text)
        assert resolve(str(run)).kind is ArtifactKind.MODEL
        assert resolve(str(run / "a")).kind is ArtifactKind.MODEL
    (run / "config.json").write_text('{"model": 1, "output_dir": "x", "jobs": [3, {"name": 4}, {}]}')
    assert resolve(str(run / "a")).kind is ArtifactKind.MODEL


@pytest.mark.parametrize("path", ["a" * 5000, "nul\0"])
def test_what_can_be_no_path_is_refused(path: str) -> None:
    with pytest.raises(ModelError, match=r"cannot be read \(|no path"):
        resolve(path)


def test_it_takes_neither_torch_nor_a_network_library_along() -> None:
    code = (
        "import sys, lowrank.pipelines.resolve; print({'torch', 'transformers', 'pydantic', 'httpx2'} & {*sys.modules})"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "set()\n"


def test_without_a_network_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client tries for half a minute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_reach, "unreachable", lambda name, kind: f"{kind} {name} cannot be reached")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the client is asked"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *name, revision: None)
    with pytest.raises(ModelError, match=r"^me/typo: no such folder here; if it is a hub name: models me/typo cannot"):
        resolve("me/typo")
    cached = {("me/model", "config.json"): "/cache/config.json"}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *name, revision: cached.get(name))
    assert resolve("me/model").kind is ArtifactKind.MODEL, "a model that is in the cache is read from there"


@pytest.mark.parametrize("path", ["runs/my run", "me/a--b", "me/..", "me/a..b", "é/ü?", "~/x", "./x", "a/b/c", "me/x."])
def test_what_no_hub_takes_for_a_name_is_a_path(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(path) == Resolved(path, ArtifactKind.MODEL, Path(path))

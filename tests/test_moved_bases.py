"""A base that has moved, and adapters on the hub: every command that takes a run or an adapter takes these."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file

import lowrank.pipelines.train
from lowrank.adapters.variants import lora
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import save_adapter
from lowrank.cli.main import main
from lowrank.config import validate_settings
from lowrank.errors import ModelError
from lowrank.pipelines.artifacts import adapter_folder
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca
from tests.checkpoints.test_peft_layout import random_adapter
from tests.export.sources import load

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.json}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and an adapter that was taken out of it, and a base that is no longer where they say."""
    folder = tmp_path_factory.mktemp("world")
    save_checkpoint_folder(folder / "model")
    lowrank.pipelines.train.train(
        validate_settings(
            {
                "model": {"path": str(folder / "model"), "device": "cpu", "dtype": "float32"},
                "data": {"train": str(write_alpaca(folder / "rows.json", 8)), "batch_size": 4},
                "max_steps": 1,
                "output_dir": str(folder / "run"),
            }
        )
    )
    shutil.copytree(folder / "run" / "default" / "last", folder / "alone")
    (folder / "model").rename(folder / "now-here")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "tiny_choice.yaml").write_text(TASK.format(folder=folder))
    (folder / "choices.json").write_text(json.dumps([{"question": "Say", "choices": [" 1", " 2"], "label": 0}]))
    return folder


def arguments_of(command: str, world: Path, path: str, out: Path) -> list[str]:
    """A command on what `path` names, as short as it can be."""
    own = {
        "chat": ["-p", "Hi", "--max-new-tokens", "2"],
        "export": ["--to", "peft", "-o", str(out), "--no-verify"],
        "serve": ["--port", "0"],
        "predict": ["--data", str(world / "rows.json"), "--max-samples", "1", "--max-new-tokens", "2",
                    "--metrics", "none", "--output", str(out)],
        "eval": ["--tasks", "tiny_choice", "--include-path", str(world / "tasks"), "--output", str(out)],
    }  # fmt: skip
    return [command, path, *own[command]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The exit code and all that was printed; a server is opened and asked who it is, not run."""
    monkeypatch.setattr("lowrank.serve.server.run", lambda served, **how: how["on_listening"](8000))

    def run(arguments: list[str]) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        output = capsys.readouterr()
        return int(left.value.code or 0), output.out + output.err

    return run


EVAL = pytest.param("eval", marks=pytest.mark.filterwarnings("ignore"))  # lm-eval's own
COMMANDS = ["chat", "export", "serve", "predict", EVAL]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("path", "file"), [("run", "config.json"), ("alone", "adapter_config.json")])
def test_a_moved_base(command: str, path: str, file: str, world: Path, tmp_path: Path, call: Any) -> None:
    arguments = arguments_of(command, world, str(world / path), tmp_path / "out")
    code, output = call(arguments)
    assert code == 4, output
    (sentence,) = [line for line in output.splitlines() if "there is no such folder" in line]
    assert f"{world / path / file} names the base {world / 'model'}" in sentence
    assert sentence.endswith("say where it is now (--base PATH, base=...)")
    code, output = call([*arguments, "--base", str(world / "now-here")])
    assert code == 0, output
    if command == "serve":
        assert ("default" if path == "run" else "alone") in output


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("path", "name"), [("run/default", "default"), ("run/checkpoints/*", "default"), ("run/default/last", "default")]
)
def test_a_job_a_checkpoint_and_a_jobs_adapter(
    command: str, path: str, name: str, world: Path, tmp_path: Path, call: Any
) -> None:
    (place,) = world.glob(path)
    arguments = arguments_of(command, world, str(place), tmp_path / "out")
    code, output = call([*arguments, "--base", str(world / "now-here")])
    assert code == 0, output
    if command == "serve":
        assert f"answers as base, {name}" in output


def test_an_export_combines_what_other_runs_hold(world: Path, tmp_path: Path, call: Any) -> None:
    arguments = arguments_of("export", world, str(world / "alone"), tmp_path / "out")
    code, output = call([*arguments, "--adapter", str(world / "run"), "--base", str(world / "now-here")])
    assert code == 0, output
    code, output = call(
        [*arguments_of("export", world, str(world / "run" / "default"), tmp_path / "out"), "--adapter", "x"]
    )
    assert (code, "is one job" in output) == (4, True)


def test_a_model_has_no_other_base(world: Path, call: Any) -> None:
    code, output = call(["serve", str(world / "now-here"), "--port", "0", "--base", str(world / "alone")])
    assert (code, "is a model by itself" in output) == (4, True)
    code, output = call(["serve", str(world / "some.gguf"), "--port", "0", "--base", str(world / "now-here")])
    assert (code, "is a model by itself" in output) == (2, True)


@pytest.mark.parametrize("place", ["run", "run/default"])
def test_training_goes_on_from_a_run_folder(place: str, world: Path, tmp_path: Path) -> None:
    given = {
        "model": {"path": str(world / "now-here"), "dtype": "float32", "device": "cpu"},
        "adapter": {"path": str(world / place)}, "data": {"train": str(world / "rows.json"), "batch_size": 4},
        "optimizer": {"learning_rate": 1e-9, "weight_decay": 0.0}, "max_steps": 1, "save_steps": None,
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    lowrank.pipelines.train.train(validate_settings(given))
    begun = load_file(world / "alone" / "adapter_model.safetensors")
    ended = load_file(tmp_path / "run" / "default" / "last" / "adapter_model.safetensors")
    assert begun.keys() == ended.keys()
    for name, value in begun.items():
        torch.testing.assert_close(ended[name], value, rtol=0, atol=1e-6)


def test_a_run_of_two_jobs_is_no_one_adapter(world: Path, tmp_path: Path) -> None:
    both = shutil.copytree(world / "run", tmp_path / "both")
    shutil.copytree(both / "default", both / "other")
    config = json.loads((both / "config.json").read_text())
    config["jobs"] = [*config["jobs"], {**config["jobs"][0], "name": "other"}]
    (both / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"adapter\.path: .* is a run of 2 jobs; name one: default, other"):
        adapter_folder(str(both), "adapter.path")
    assert adapter_folder(str(both / "other"), "adapter.path").parent == both / "other"


# ---- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache as its own library lays it out, with an adapter `me/tuned` on a base `me/base`; no network."""
    cache = tmp_path / "hub"
    for name, commit in (("base", "b" * 40), ("tuned", "a" * 40)):
        folder = cache / f"models--me--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
    shutil.copytree(world / "now-here", cache / "models--me--base" / "snapshots" / ("b" * 40))
    model = load(world / "now-here", torch.float32)
    snapshot = cache / "models--me--tuned" / "snapshots" / ("a" * 40)
    save_adapter(snapshot, random_adapter(model, lora.LoraConfig(rank=2)), describe_base(model, "me/base"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_on_the_hub(command: str, world: Path, hub: Path, tmp_path: Path, call: Any) -> None:
    code, output = call(arguments_of(command, world, "me/tuned", tmp_path / "out"))
    assert code == 0, output
    assert "a" * 40 not in output, "it is called by its name"
    if command == "serve":
        assert "base, tuned" in output


def test_an_adapter_on_the_hub_as_a_start_and_as_a_reward_model(hub: Path) -> None:
    assert adapter_folder("me/tuned", "adapter.path") == hub

"""A value head in exports: a reward model is nothing without it, and PPO's critic goes with the adapter alone."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank
from lowrank.checkpoints.value_head import FILE, read_value_head, write_value_head
from lowrank.config import RunConfig
from lowrank.export.targets.lora_gguf import LoraGGUFExportConfig
from lowrank.export.targets.merged import MergedExportConfig
from lowrank.export.targets.peft import PeftExportConfig
from lowrank.pipelines.export import export_targets
from lowrank.pipelines.export_checks import export_requests
from lowrank.pipelines.export_source import open_source
from lowrank.pipelines.inference import open_inference_model
from lowrank.pipelines.train import train
from lowrank.records import Conversation, Message
from lowrank.report.summary_view import render_summary
from lowrank.serve.engines import ServingOptions, open_engine
from lowrank.terminal import Console
from tests.command_line import lowrank as lowrank_command


def silent(text: str) -> None:
    """For notices that do not matter here."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model, and a judge with a second seed."""
    world = tmp_path_factory.mktemp("world")
    rows = [{"prompt": f"{n} + 1?", "chosen": str(n + 1), "rejected": "no"} for n in range(12)]
    (world / "pairs.json").write_text(json.dumps(rows))
    given: dict[str, Any] = {
        "model": {"path": "lowrank/tiny", "device": "cpu", "dtype": "float32"},
        "data": {"train": str(world / "pairs.json"), "eval": str(world / "pairs.json"), "batch_size": 4},
        "objective": {"type": "reward"},
        "optimizer": {"learning_rate": 1e-2},
        "max_steps": 4,
        "output_dir": str(world / "run"),
        "jobs": [{"name": "judge", "adapter": {"rank": 4}}, {"name": "other", "adapter": {"rank": 4}, "seed": 3}],
    }
    train(RunConfig(**given))
    return world / "run"


def export(run: Path, home: Path, targets: Sequence[Any], *adapters: str) -> tuple[dict[str, Any], list[str]]:
    notices: list[str] = []
    found = open_source(str(run), adapters=adapters, notify=notices.append)
    return export_targets(found, export_requests(targets, home), verify=False, notify=silent)["targets"], notices


def rewards(path: Path, name: str | None = None) -> list[float]:
    trained = open_inference_model(str(path), notify=silent)
    name = name or next(each for each in trained.names if each in trained.value_heads)
    conversations = [Conversation((Message("user", "2 + 1?"), Message("assistant", answer))) for answer in ("3", "no")]
    return trained.rewards([(name, each) for each in conversations])


def test_rewards_are_those_of_the_run(run: Path, tmp_path: Path) -> None:
    targets = [PeftExportConfig(), MergedExportConfig(dtype="float32"), LoraGGUFExportConfig()]
    reported, _ = export(run, tmp_path, targets, "judge")
    trained = read_value_head(run / "judge" / "best")
    assert trained is not None
    for name in ("peft", "merged"):
        head = read_value_head(tmp_path / name)
        assert head is not None
        assert torch.equal(head, trained)
    expected = rewards(run, "judge")
    assert rewards(tmp_path / "peft") == pytest.approx(expected, rel=0.1, abs=0.05)  # the folder's base is in 16 bit
    for name in ("peft", "merged"):
        assert any(FILE in note for note in reported[name]["notes"])
        card = (tmp_path / name / "README.md").read_text()
        assert FILE in card
        assert_is_the_card_of_a_judge(card, tmp_path / name)
    assert_is_the_card_of_a_judge((run / "judge" / "best" / "README.md").read_text(), run / "judge" / "best")
    assert any("gives no rewards" in note for note in reported["lora_gguf"]["notes"])


def assert_is_the_card_of_a_judge(card: str, folder: Path) -> None:
    """The hub is told what it is, and the code in it gives rewards."""
    assert "pipeline_tag: text-classification" in card
    assert "- reward-model" in card
    code = card.partition("```python\n")[2].partition("```")[0].replace("path/of/this/folder", str(folder))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code, {})
    assert len(json.loads(output.getvalue())) == 2


def test_rewards_in_python(run: Path) -> None:
    judge = lowrank.load(run)
    chats = [[{"role": "user", "content": "2 + 1?"}, {"role": "assistant", "content": each}] for each in ("3", "no")]
    expected = rewards(run, "judge")
    assert judge.rewards(chats, "judge") == expected
    assert judge.rewards(chats[1], "judge") == expected[1]
    with pytest.raises(lowrank.ModelError, match="2 reward models here; say which: adapter= one of judge, other"):
        judge.rewards(chats)
    with pytest.raises(lowrank.DataError, match="conversation 1: wrong role order: the last turn is user"):
        judge.rewards("2 + 1?", "judge")  # type: ignore[arg-type]
    with pytest.raises(lowrank.ModelError, match="'base' is no reward model"):
        judge.rewards(chats, "base")


def test_who_only_judges_is_named_where_it_writes(run: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "2 + 1?", "completion": "3"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for arguments in (["chat", str(run), "-p", "hi"], ["predict", str(run), "--data", str(tmp_path / "rows.json")]):
        completed = lowrank_command(*arguments, "--max-new-tokens", "2")
        assert "reward model" in completed.stderr + completed.stdout, completed
    serving: list[str] = []
    open_engine(str(run), ServingOptions(), serving.append).close()
    assert any("judge, other are reward models" in each for each in serving)


def test_the_end_of_a_run_of_judges_tells_how_to_get_rewards(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    stream = io.StringIO()
    Console(file=stream, width=300).print(render_summary(summary))
    assert f"lowrank.load('{run}').rewards(" in stream.getvalue()
    assert " chat " not in stream.getvalue()


def test_several_as_one_say_that_they_give_none(run: Path, tmp_path: Path) -> None:
    _, notices = export(run, tmp_path, [PeftExportConfig()], "judge", "other")
    assert not (tmp_path / FILE).exists()
    assert any("value heads are left out" in text for text in notices)
    assert any("one adapter of 2: add, weights judge 1, other 1" in text for text in notices)


def test_a_critic_goes_with_its_adapter_alone(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "model": {"path": "lowrank/tiny", "device": "cpu", "dtype": "float32"},
        "data": {"train": "lowrank/demo", "batch_size": 4},
        "max_steps": 1,
        "output_dir": str(tmp_path / "run"),
    }
    train(RunConfig(**given))
    config = tmp_path / "run" / "config.json"
    text = json.loads(config.read_text())
    for job in (text, *text.get("jobs", ())):
        job["objective"] = {"type": "ppo", "reward_model": str(tmp_path)}
    config.write_text(json.dumps(text))
    for which in ("best", "last"):
        if (tmp_path / "run" / "default" / which).is_dir():
            write_value_head(tmp_path / "run" / "default" / which, torch.ones(128), critic=True)
    reported, _ = export(tmp_path / "run", tmp_path / "home", [PeftExportConfig(), MergedExportConfig()])
    assert (tmp_path / "home" / "peft" / FILE).exists()
    assert not (tmp_path / "home" / "merged" / FILE).exists()
    assert any("critic" in note for note in reported["peft"]["notes"])
    assert "text-generation" in (tmp_path / "home" / "peft" / "README.md").read_text()
    again = open_inference_model(str(tmp_path / "home" / "peft"), notify=silent)
    assert not again.value_heads  # a critic gives no rewards

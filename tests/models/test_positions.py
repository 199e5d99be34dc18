"""Rows and questions longer than a base reads: counted from config.json, cut or refused before it loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers

from lowrank.config import validate_settings
from lowrank.errors import DataError
from lowrank.models.positions import can_be_stretched, positions_of
from lowrank.pipelines.job_data import prepare_all
from lowrank.pipelines.train import train
from lowrank.report.events import Event, Notice
from tests.checkpoint_folder import save_checkpoint_folder
from tests.tiny_models import FAMILIES

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("family", "changes", "positions", "stretches"),
    [
        ("llama", {}, 64, True),
        ("gpt2", {}, 64, False),
        ("opt", {}, 64, False),
        ("bloom", {}, None, False),
        ("mpt", {}, None, False),
        ("mpt", {"attn_config": {"alibi": False}}, 64, False),
        ("falcon", {"alibi": True}, None, None),
        ("falcon", {"alibi": False, "max_position_embeddings": 32}, 32, None),
        ("qwen2", {"rope_parameters": YARN}, 256, False),
        ("qwen2", {"rope_parameters": YARN, "max_position_embeddings": 256}, 256, False),
    ],
)
def test_positions_by_config_alone(family: str, changes: dict[str, Any], positions: int, stretches: bool) -> None:
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    assert positions_of(config) == positions
    if stretches is not None:
        assert can_be_stretched(config) == stretches


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 and a Llama of 64 positions, and rows of about 200 tokens among short ones."""
    folder = tmp_path_factory.mktemp("world")
    save_checkpoint_folder(folder / "llama", max_position_embeddings=64)
    save_checkpoint_folder(folder / "gpt2")
    config = transformers.GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "gpt2")
    rows = [{"instruction": f"Say {n}", "input": "", "output": "x" * (150 if n % 2 else 5)} for n in range(8)]
    (folder / "a.json").write_text(json.dumps(rows))
    return folder


def read(world: Path, model: Any, received: list[Event] | None = None, **data: Any) -> tuple[list[int], list[str]]:
    """(lengths of the segments, warnings)."""
    received = [] if received is None else received
    given = {"model": model, "data": {"train": str(world / "a.json"), **data}, "output_dir": str(world / "o")}
    config = validate_settings(given)
    from lowrank.models.loading.pretrained import load_tokenizer

    (own,) = prepare_all(config.jobs, config.model, load_tokenizer(config.model), received.append, False)
    lengths = [len(segment) for sample in own.train.samples for segment in sample]
    return lengths, [event.text for event in received if isinstance(event, Notice)]


def test_rows_are_cut_where_the_base_ends(world: Path) -> None:
    lengths, described = read(world, str(world / "llama"))
    assert max(lengths) == 64
    (text,) = described
    assert "reads 64 tokens" in text
    assert "rows of more than 64 are cut at their end" in text
    assert "model.rope_scaling.factor=32" in text
    assert "rope_scaling" not in read(world, str(world / "gpt2"))[1][0]


def test_rows_are_whole_where_it_is_stretched_or_short_enough(world: Path) -> None:
    stretched = {"path": str(world / "llama"), "rope_scaling": {"type": "yarn", "factor": 4}}
    lengths, described = read(world, stretched)
    assert max(lengths) > 64
    assert not described
    assert not read(world, str(world / "llama"), max_length=64)[1]


def test_other_ways_with_long_rows(world: Path) -> None:
    lengths, described = read(world, str(world / "gpt2"), on_too_long="split", max_length=100)
    assert max(lengths) <= 64
    assert len(lengths) > 8
    assert "are cut in pieces" in described[0]
    assert "are left out" in read(world, str(world / "gpt2"), on_too_long="drop")[1][0]
    with pytest.raises(DataError):
        read(world, str(world / "gpt2"), strict=True)


def test_errors_about_something_else_come_without_the_limit(world: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps([{"a": 1}]))
    received: list[Event] = []
    with pytest.raises(DataError, match=r"no column plays the part|format not recognized"):
        read(world, str(world / "gpt2"), received, train=str(tmp_path / "other.json"))
    assert not received
    with pytest.raises(DataError, match=r"longer than data\.max_length"):
        read(world, str(world / "gpt2"), received, on_too_long="error")
    assert [type(event) for event in received] == [Notice]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_trains(world: Path, name: str, tmp_path: Path) -> None:
    given = {
        "model": str(world / name), "data": {"train": str(world / "a.json")}, "max_steps": 1, "save_steps": None,
        "output_dir": str(tmp_path / "run"), "ignore_memory_plan": True,
    }  # fmt: skip
    summary = train(validate_settings(given))
    assert math.isfinite(summary["jobs"]["default"]["last_loss"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["jobs"][0]["data"]["max_length"] == 2048

"""What cuts a model over devices there (DeepSpeed, FSDP, accelerate) cuts a frozen base here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.compat.llamafactory.convert import convert
from lowrank.compat.llamafactory.keys import Keys
from lowrank.compat.llamafactory.sharding import sharding

TWO = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
EXAMPLES: dict[str, Any] = json.loads((Path(__file__).parent / "examples.json").read_text())


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def found(folder: Path, environment: dict[str, str] = TWO, **given: Any) -> tuple[str, str]:
    """The native base, and all that is said."""
    required = {name: "-" for name, field in Keys.model_fields.items() if field.is_required()}
    base, lines = sharding(Keys.model_validate(required | given), folder, environment)
    return base.get("base", "replicated"), "\n".join(lines)


@pytest.mark.parametrize(
    ("stage", "base"),
    [("z0", "replicated"), ("z2", "replicated"), ("z2_offload", "replicated"), ("z3", "sharded")],
)
def test_deepspeed_by_its_own_files(tmp_path: Path, stage: str, base: str) -> None:
    name = f"deepspeed/ds_{stage}_config.json"
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / name).write_text(json.dumps(EXAMPLES[name]))
    (tmp_path / "train_lora").mkdir()
    chosen, text = found(tmp_path / "train_lora", deepspeed=name)
    assert chosen == base
    assert ("as base: sharded says" in text) == (base == "sharded")
    assert found(tmp_path, deepspeed=EXAMPLES[name])[0] == base, "or as a mapping"


def test_parameters_in_host_memory_are_so_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    z3 = EXAMPLES["deepspeed/ds_z3_offload_config.json"]
    assert found(tmp_path, deepspeed=z3)[0] == "sharded", "without a GPU they lie there already"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert found(tmp_path, deepspeed=z3)[0] == "sharded_offload"
    assert found(tmp_path, fsdp="full_shard auto_wrap offload")[0] == "sharded_offload"


@pytest.mark.parametrize(
    ("fsdp", "configuration", "base"),
    [
        ("full_shard auto_wrap", None, "sharded"),
        (["full_shard", "auto_wrap"], {}, "sharded"),
        (True, {"reshard_after_forward": True}, "sharded"),
        (True, {"fsdp_reshard_after_forward": "false"}, "replicated"),
        ("shard_grad_op", {}, "replicated"),
        ("hybrid_shard", {}, "sharded"),
        (True, {"fsdp_sharding_strategy": "SHARD_GRAD_OP"}, "replicated"),
    ],
)
def test_fsdp_as_transformers_reads_it(tmp_path: Path, fsdp: Any, configuration: Any, base: str) -> None:
    assert found(tmp_path, fsdp=fsdp, fsdp_config=configuration)[0] == base
    assert found(tmp_path, fsdp="")[1] == ""
    assert found(tmp_path, fsdp_config={"reshard_after_forward": True}) == (
        "replicated", "fsdp_config has no effect without fsdp")  # fmt: skip


def test_accelerate_launch(tmp_path: Path) -> None:
    """What `accelerate launch --config_file fsdp2_config.yaml` puts into the environment."""
    second = TWO | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    assert found(tmp_path, second)[0] == "sharded"
    assert found(tmp_path, second | {"FSDP_RESHARD_AFTER_FORWARD": "false"})[0] == "replicated"
    first = TWO | {"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "1"}
    assert found(tmp_path, first)[0] == "sharded"
    assert found(tmp_path, first | {"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"})[0] == "replicated"
    zero = TWO | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert found(tmp_path, zero)[0] == "sharded"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"finetuning_type": "full"}, "must fit on one"),
        ({"stage": "ppo"}, "cannot answer"),
        ({"predict_with_generate": True}, "cannot answer"),
        ({"additional_target": "embed_tokens"}, "whole head"),
    ],
)
def test_what_a_base_in_parts_cannot_do_keeps_it_whole(tmp_path: Path, given: dict[str, Any], why: str) -> None:
    base, text = found(tmp_path, fsdp="full_shard", **given)
    assert base == "replicated"
    assert why in text


def test_one_device_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    base, text = found(tmp_path, {}, fsdp="full_shard")
    assert (base, "there is one device" in text) == ("replicated", True)
    base, text = found(tmp_path, deepspeed="none/such.json")
    assert (base, "none/such.json cannot be read here" in text) == ("replicated", True)


def test_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": "a", "output": "b"}] * 8
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    file = EXAMPLES["train_lora/qwen3_lora_sft_ds3.yaml"] | {
        "model_name_or_path": "lowrank/tiny", "dataset": "rows", "dataset_dir": str(tmp_path),
        "output_dir": str(tmp_path / "out"), "deepspeed": EXAMPLES["deepspeed/ds_z3_config.json"],
    }  # fmt: skip
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    converted = convert(file, folder=tmp_path)
    assert (converted.config["base"], converted.config["devices"]) == ("sharded", 2)
    assert sum(text.startswith("deepspeed: ") for text in converted.warnings) == 1

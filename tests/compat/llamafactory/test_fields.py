"""Each argument of LLaMA-Factory's own is honored, warned about or refused; what an honored key calls for is done.

`fields.json` has the fields of its argument classes by module (0.9.6, August 2026).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowrank.compat import load_any
from lowrank.compat.llamafactory.commands import translate
from lowrank.compat.llamafactory.other_keys import known
from lowrank.data.tokenized import write_tokenized
from lowrank.errors import ConfigError
from lowrank.segments import Segment
from tests.compat.llamafactory.files import INFO, MINIMAL

FIELDS: dict[str, list[str]] = json.loads(Path(__file__).with_name("fields.json").read_text("utf-8"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    info = {**INFO, "three": {"file_name": "identity.json", "split": "train[:3]"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    for name in ("identity.json", "alpaca_en_demo.json"):
        (tmp_path / "data" / name).write_text("[]")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(lines: str) -> str:
    given = {line.partition(":")[0]: line for line in (MINIMAL + lines).splitlines()}
    Path("run.yaml").write_text("\n".join(given.values()) + "\n")
    return "run.yaml"


def test_every_argument_of_theirs_is_known() -> None:
    names = [name for fields in FIELDS.values() for name in fields]
    assert len(names) == 270
    assert sorted(set(names) - set(known())) == []


@pytest.mark.parametrize(
    ("lines", "path", "value"),
    [
        ("val_size: 2\n", "data.validation_split", 2),
        ("mix_strategy: interleave_over\n", "data.mix", "interleave_over"),
        ("mix_strategy: interleave_once\n", "data.mix", "interleave_once"),
        ("tokenized_path: kept\n", "data.tokenized_path", "kept"),
        ("moe_aux_loss_coef: 0.01\n", "model.router_aux_loss_coef", 0.01),
        ("train_from_scratch: true\nfinetuning_type: full\nseed: 7\n", "model.random_init", 7),
        ("dataset: three\n", "data.train.0.split", "train[:3]"),
    ],
)
def test_a_key_becomes(place: Path, lines: str, path: str, value: object) -> None:
    config, _ = load_any(written(lines))
    found: Any = config.model_dump(mode="json")
    for key in path.split("."):
        found = found[int(key) if key.isdigit() else key]
    assert found == value


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hub_private_repo: false\n", "hub_private_repo has no effect: a new repository is private"),
        ("hub_revision: v2\n", "hub_revision has no effect"),
        ("hub_strategy: checkpoint\n", "hub_strategy has no effect: what is trained is uploaded once"),
        ("push_to_hub_token: hf_abc\n", "HF_TOKEN"),
        ("group_by_length: true\n", "group_by_length has no effect"),
        ("ref_model_quantization_bit: 4\n", "ref_model_quantization_bit has no effect"),
        ("hub_private_repo: true\nhub_strategy: every_save\ngroup_by_length: false\noft_rank: 0\n", None),
    ],
)
def test_what_an_honored_key_calls_for_is_not_dropped_in_silence(place: Path, line: str, expected: str | None) -> None:
    _, warnings = load_any(written(line))
    assert warnings == [] if expected is None else expected in "".join(warnings)
    assert "hf_abc" not in "".join(warnings)


def test_a_number_of_blocks_is_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"oft_rank: 8 is not supported: .* set oft_block_size"):
        load_any(written("finetuning_type: oft\noft_rank: 8\noft_block_size: 0\n"))


def test_a_new_adapter_is_trained_on_the_old_one_merged(place: Path) -> None:
    found = translate(["train", written("adapter_name_or_path: saves/a\ncreate_new_adapter: true\n")])
    assert found.first == [
        ["export", "saves/a", "--base", "m/x", "--to", "merged", "--output", "out-base"],
    ]  # fmt: skip
    assert found.arguments == ["train", "run.yaml", "model_name_or_path=out-base", "adapter_name_or_path=null",
                           "create_new_adapter=false"]  # fmt: skip
    assert found.arguments is not None
    config, _ = load_any(found.arguments[1], found.arguments[2:])
    assert (config.model.path, config.jobs[0].adapter.path) == ("out-base", None)


@pytest.mark.parametrize(("kind", "target"), [("lora", "peft"), ("full", "merged")])
def test_the_result_is_pushed_after_training(
    place: Path, monkeypatch: pytest.MonkeyPatch, kind: str, target: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = translate(["train", written(f"push_to_hub: true\nhub_model_id: me/it\nfinetuning_type: {kind}\n")])
    assert found.then == [["export", "out", "--to", target, "--push", "me/it"]]


def test_where_tokenized_data_is_kept_the_datasets_need_not_be_here(place: Path) -> None:
    lines = "tokenized_path: kept\ndataset: gone\neval_dataset: gone_too\ndataset_dir: nowhere\n"
    with pytest.raises(ConfigError, match=r"there is no dataset_info\.json"):
        load_any(written(lines))
    write_tokenized("kept", [(Segment(np.arange(3), np.ones(3, np.float32)),)], [])
    assert [source.path for source in load_any(written(lines))[0].data.train] == ["gone"]

"""Files of LLaMA-Factory's V1, as in its examples, with paths of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lowrank.compat import load_any
from lowrank.compat.llamafactory.commands import translate
from lowrank.compat.llamafactory.v1 import as_v0
from lowrank.errors import ConfigError

LORA = """
model: lowrank/tiny
model_class: llm
peft_config:
  name: lora
  r: 16
  lora_alpha: 32
  lora_dropout: 0.05
  target_modules: all
kernel_config:
  name: auto
dist_config:
  name: fsdp2
  dcp_path: null
train_dataset: data/demo.yaml
output_dir: ./outputs/test_lora
micro_batch_size: 1
global_batch_size: 4
cutoff_len: 2048
max_steps: 10
sample_backend: hf
max_new_tokens: 128
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.json").write_text(json.dumps([{"instruction": "1?", "input": "", "output": "1"}] * 3))
    (tmp_path / "data" / "demo.yaml").write_text(
        "mine: {path: data/mine.json, source: local, converter: alpaca}\n"
        "more: {path: a/pairs, split: train_prefs, size: 500}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_lora(place: Path) -> None:
    Path("v1.yaml").write_text(LORA)
    config, warnings = load_any("v1.yaml", ["lora_rank=4"])
    (job,) = config.jobs
    adapter = job.adapter.model_dump()
    assert (adapter["type"], adapter["rank"], adapter["alpha"], adapter["dropout"]) == ("lora", 4, 32, 0.05)
    assert job.optimizer.learning_rate == 1e-4
    assert job.optimizer.model_dump()["weight_decay"] == 0.01, "torch's default, which V1 leaves in place"
    assert job.schedule.type == "constant"
    assert (job.data.batch_size, job.max_steps, config.model.dtype, config.save_steps) == (4, 10, "bfloat16", None)
    mine, more = job.data.train
    assert (mine.path, mine.format, more.path, more.split, more.max_samples) == (
        "data/mine.json", "alpaca", "a/pairs", "train_prefs", 500)  # fmt: skip
    assert any(text.startswith("fsdp: there is one device to cut the base over") for text in warnings)
    Path("v1.yaml").write_text(LORA.replace("dcp_path: null", "ep_size: 16"))
    _, warnings = load_any("v1.yaml", [])
    assert any(text.startswith("dist_config.ep_size has no effect") for text in warnings)


def test_where_rows_name_their_pictures_from(place: Path) -> None:
    """From where the data is named from; of data that is named whole, from its own folder, wherever one stands."""
    for path, folder in (("data/mine.json", "."), (str(place / "data" / "mine.json"), None)):
        Path("data/demo.yaml").write_text(f"mine: {{path: {path}, source: local, converter: alpaca}}\n")
        Path("v1.yaml").write_text(LORA)
        (source,) = load_any("v1.yaml")[0].jobs[0].data.train
        assert (Path(source.path).resolve(), source.media_dir) == (place / "data" / "mine.json", folder)


def test_pairs_are_for_dpo_and_no_peft_is_full(place: Path) -> None:
    Path("data/demo.yaml").write_text("pairs: {path: a/pairs, converter: pair}\n")
    lines = [line for line in LORA.splitlines() if not line.startswith(("peft", "  ", "dist", "kernel"))]
    Path("v1.yaml").write_text("\n".join(lines) + "\n")
    config, _ = load_any("v1.yaml")
    assert (config.jobs[0].objective.type, config.jobs[0].tuning) == ("dpo", "full")


def test_export(place: Path) -> None:
    Path("v1.yaml").write_text(
        "model: lowrank/tiny\npeft_config: {name: lora, adapter_name_or_path: ./outputs/it, export_dir: ./merged,"
        " export_size: 5, infer_dtype: auto}\n"
    )
    arguments = translate(["export", "v1.yaml"]).arguments
    assert arguments == [
        "export",
        "./outputs/it",
        "--base",
        "lowrank/tiny",
        "--output",
        "./merged",
        "max_shard_size=5GB",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("save_epochs: 1\n", "save_epochs: V0 has no word for it"),
        ("peft_config: {name: vera}\n", "peft_config.name: 'vera' is not read; choose lora or freeze"),
        ("learning_rat: 1\n", "learning_rat: unknown key of V1; did you mean 'learning_rate'"),
        ("global_batch_size: 3\nmicro_batch_size: 2\n", "global_batch_size: 3 is not a multiple"),
        ("train_dataset: gone.yaml\n", "train_dataset: there is no gone.yaml"),
    ],
)
def test_what_is_not_read_is_named(place: Path, line: str, problem: str) -> None:
    settings = "model: lowrank/tiny\noutput_dir: out\ntrain_dataset: data/demo.yaml\n"
    lines = {each.partition(":")[0]: each for each in (settings + line).splitlines()}
    Path("v1.yaml").write_text("\n".join(lines.values()) + "\n")
    with pytest.raises(ConfigError, match=problem):
        load_any("v1.yaml")


def test_options_of_fsdp2_are_read_or_named(place: Path) -> None:
    """True is 1 in Python: `offload_params: true` was lost without a word, and what V0 reads had "no effect"."""
    options = "offload_params: true\n  reshard_after_forward: false\n  cpu_ram_efficient_loading: true\n  dp_size: 1"
    v0 = as_v0(yaml.safe_load(LORA.replace("dcp_path: null", options)), place)
    assert v0.settings["fsdp_config"] == {"offload_params": True, "reshard_after_forward": False}
    (text,) = [text for text in v0.warnings if "dist_config" in text]
    assert text.startswith("dist_config.cpu_ram_efficient_loading has no effect")
    with pytest.raises(ConfigError, match="dist_config: expected a mapping"):
        as_v0({**yaml.safe_load(LORA), "dist_config": "fsdp2"}, place)

"""What people give as a model and is none: one sentence that says what it is and what takes it, before loading."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers

from lowrank.errors import ModelError
from lowrank.models.config import ModelConfig
from lowrank.models.loading.kind import check_path
from lowrank.models.loading.pretrained import check_model
from lowrank.pipelines.inference import open_inference_model
from lowrank.planning.simulation import read_config
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca
from tests.command_line import lowrank
from tests.tiny_models import FAMILIES

_SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
OTHERS: dict[str, tuple[Any, str]] = {
    "bert": (lambda: transformers.BertConfig(**_SMALL), "an encoder: every token sees the whole text"),
    "roberta": (lambda: transformers.RobertaConfig(**_SMALL), "an encoder: every token sees the whole text"),
    "modernbert": (lambda: transformers.ModernBertConfig(**_SMALL), "an encoder: every token sees the whole text"),
    "bert as a decoder": (lambda: transformers.BertConfig(**_SMALL, is_decoder=True), "a decoder of an encoder's"),
    "whisper": (lambda: transformers.WhisperConfig(), "an encoder-decoder"),
    "bart": (lambda: transformers.BartConfig(), "an encoder-decoder"),
    "t5": (lambda: transformers.T5Config(), "an encoder-decoder"),
    "an image model": (lambda: transformers.ViTConfig(), "no causal language model"),
    "clip": (lambda: transformers.CLIPConfig(), "no causal language model"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_by_kind(name: str, tmp_path: Path) -> None:
    make, described = OTHERS[name]
    make().save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=described) as caught:
        check_model(ModelConfig(path=str(tmp_path / "m")))
    assert "lowrank takes causal language models" in str(caught.value)


def test_a_speech_model_whose_file_leaves_out_that_it_has_an_encoder(tmp_path: Path) -> None:
    """transformers' decoder for Whisper exists, and would take half of the weights."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "whisper"}))
    with pytest.raises(ModelError, match="an encoder-decoder"):
        check_model(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_decoders_pass(family: str, tmp_path: Path) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    check_model(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("m.gguf", "`lowrank serve` and `lowrank chat` answer with it"),
        ("run.yaml", "`lowrank train .*run.yaml` runs it"),
        ("run.json", "`lowrank train .*run.json` runs it"),
        ("model/model.safetensors", "give the folder with its config.json and tokenizer: .*model$"),
        ("model/config.json", "one file of a model; give its folder: .*model$"),
        ("adapter/adapter_model.safetensors", r"the weights of an adapter; .* adapter\.path"),
        ("adapter", r"is an adapter, not a model: train on with model=the/base adapter\.path=.*adapter"),
        ("pytorch_model.bin", "pickled weights, which lowrank does not open"),
        ("notes.txt", "a model is a folder"),
        ("run", "is a run folder of lowrank, not a model: `lowrank chat .*run`"),
        ("ggufs", "`lowrank serve .*a.gguf` answers"),
        ("above", "no model's folder; there is one in inner, inside it"),
        ("empty", "so it is no model's folder"),
    ],
)
def test_files_and_folders(name: str, described: str, tmp_path: Path) -> None:
    for file, content in {
        "m.gguf": "GGUF", "run.yaml": "model: x", "run.json": "{}", "pytorch_model.bin": "x", "notes.txt": "x",
        "model/config.json": '{"model_type": "llama"}', "model/model.safetensors": "x",
        "adapter/adapter_config.json": json.dumps({"base_model_name_or_path": "the/base"}),
        "adapter/adapter_model.safetensors": "x", "run/config.json": json.dumps({"model": {}, "output_dir": "run"}),
        "ggufs/a.gguf": "GGUF", "above/inner/config.json": "{}", "empty/.keep": "",
    }.items():  # fmt: skip
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=described):
        check_path(str(tmp_path / name))


@pytest.mark.parametrize("command", ["train", "plan", "serve", "export"])
def test_every_command_refuses_an_encoder(command: str, tmp_path: Path) -> None:
    folder = save_checkpoint_folder(tmp_path / "bert")
    transformers.BertForMaskedLM(transformers.BertConfig(**{**_SMALL, "vocab_size": 259})).save_pretrained(folder)
    write_alpaca(tmp_path / "a.json", 4)
    (tmp_path / "run.yaml").write_text(json.dumps({"model": "bert", "data": {"train": "a.json"}, "output_dir": "out"}))
    arguments = {"train": ["run.yaml"], "plan": ["run.yaml"], "export": ["bert", "--to", "merged", "-o", "x"]}
    done = lowrank(command, *arguments.get(command, ["bert"]), cwd=tmp_path)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "'bert' (BertForMaskedLM), an encoder" in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr
    with pytest.raises(ModelError, match="an encoder"):  # `lowrank chat`
        open_inference_model(str(folder))


def test_no_weights_is_said_before_a_plan_is_made(tmp_path: Path) -> None:
    folder = save_checkpoint_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (tmp_path / "run.yaml").write_text(json.dumps({"model": "model", "data": {"train": "no.json"}, "output_dir": "o"}))
    write_alpaca(tmp_path / "no.json", 4)
    done = lowrank("train", "run.yaml", cwd=tmp_path)
    assert done.returncode == 4
    described = " ".join((done.stdout + done.stderr).split())
    assert "has a config.json and no weights" in described
    assert "free on" not in described


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_a_plan_never_waits_for_a_config(tmp_path: Path) -> None:
    """transformers takes what is no file for what is not there, and names the wrong thing."""
    folder = save_checkpoint_folder(tmp_path / "model")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ModelError, match=r"config\.json: a pipe"):
        read_config(ModelConfig(path=str(folder)))

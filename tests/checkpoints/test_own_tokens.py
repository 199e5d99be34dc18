"""Tokens that an adapter brings in rows that its base had to spare: PEFT and its own tokenizer as the oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers

from lowrank.checkpoints.own_tokens import learn_tokens
from lowrank.compat.unsloth import FastLanguageModel
from lowrank.config import validate_settings
from lowrank.data.config import DataConfig
from lowrank.errors import ModelError
from lowrank.models.config import ModelConfig
from lowrank.pipelines.inference import folder_reader, open_inference_model
from lowrank.pipelines.train import train
from lowrank.serve.vllm_engine.adapters import refuse_own_rows
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca
from tests.command_line import lowrank

TEXT = "say <yes> or <no>"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with 8 rows to spare; `own`: an adapter that trained two of them; `untrained`: one that did not."""
    folder = tmp_path_factory.mktemp("world")
    tokens = len(transformers.AutoTokenizer.from_pretrained(save_checkpoint_folder(folder / "probe")))
    save_checkpoint_folder(folder / "base", vocab_size=tokens + 8)
    for name, rows in (("own", [tokens, tokens + 1]), ("untrained", None)):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
        tokenizer.add_tokens(["<yes>", "<no>"])
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=rows, lora_alpha=4
        )
        tuned = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        tuned.save_pretrained(str(folder / name))
        tokenizer.save_pretrained(str(folder / name))
        fields = json.loads((folder / name / "adapter_config.json").read_text())
        (folder / name / "adapter_config.json").write_text(
            json.dumps({**fields, "base_model_name_or_path": str(folder / "base")})
        )
        ids = tokenizer(TEXT)["input_ids"]
        torch.save({"ids": ids, "logits": tuned.eval()(torch.tensor([ids])).logits[0].detach()}, folder / f"{name}.pt")
    return folder


def test_they_are_read_as_peft_reads_them(world: Path) -> None:
    notices: list[str] = []
    trained = open_inference_model(str(world / "own"), notify=notices.append)
    expected = torch.load(world / "own.pt")
    assert trained.base.tokenizer(TEXT)["input_ids"] == expected["ids"]
    assert any("brings 2 tokens of its own" in each and "<yes>, <no>" in each for each in notices)
    assert trained.base.tokenizer.decode(expected["ids"]) == TEXT


def test_those_without_a_trained_row_are_not(world: Path) -> None:
    trained = open_inference_model(str(world / "untrained"), notify=lambda _: None)
    assert "<yes>" not in trained.base.tokenizer.get_vocab()


def test_exports_keep_them(world: Path, tmp_path: Path) -> None:
    done = lowrank("export", str(world / "own"), "--to", "merged", "-o", str(tmp_path / "m"))
    assert done.returncode == 0, done.stdout + done.stderr
    written, expected = next((tmp_path / "m").rglob("config.json")).parent, torch.load(world / "own.pt")
    assert transformers.AutoTokenizer.from_pretrained(written)(TEXT)["input_ids"] == expected["ids"]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(written)
    logits = model(torch.tensor([expected["ids"]])).logits[0]
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)


def test_further_training_keeps_them(world: Path, tmp_path: Path) -> None:
    given = {
        "model": str(world / "base"), "adapter": {"path": str(world / "own")}, "max_steps": 1,
        "data": {"train": str(write_alpaca(tmp_path / "rows.json", 4))}, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    train(validate_settings(given))
    saved = tmp_path / "run" / "default" / "last"
    assert "<yes>" in transformers.AutoTokenizer.from_pretrained(saved).get_vocab()
    assert "<yes>" in open_inference_model(str(tmp_path / "run"), notify=lambda _: None).base.tokenizer.get_vocab()


def test_unsloths_front_reads_them_and_vllm_is_refused_them(world: Path) -> None:
    expected = torch.load(world / "own.pt")
    model, tokenizer = FastLanguageModel.from_pretrained(str(world / "own"), 128, torch.float32, load_in_4bit=False)
    assert tokenizer(TEXT)["input_ids"] == expected["ids"]
    logits = model(torch.tensor([expected["ids"]])).logits[0]
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)
    model, tokenizer = FastLanguageModel.from_pretrained(str(world / "base"), 128, torch.float32, load_in_4bit=False)
    FastLanguageModel.get_peft_model(model, r=4).load_adapter(world / "own", "other")
    assert tokenizer(TEXT)["input_ids"] == expected["ids"]
    with pytest.raises(ModelError, match="rows of the embedding that it has trained"):
        refuse_own_rows(world / "own", ModelConfig(path=str(world / "base")))
    refuse_own_rows(world / "untrained", ModelConfig(path=str(world / "base")))


def test_another_tokenizer_is_refused_not_guessed_at(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "own", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["added_tokens"][-1]["content"] = "<maybe>"
    file.write_text(json.dumps(content), "utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "base")
    adapters = {"a": world / "own", "b": tmp_path / "other"}
    with pytest.raises(ModelError, match=r"b: its tokenizer .* has the token '<maybe>' at \d+, and it would be"):
        learn_tokens(tokenizer, adapters)
    bare: Any = SimpleNamespace(config=DataConfig())
    read = folder_reader(transformers.AutoTokenizer.from_pretrained(world / "base"), bare, {}, "chatml")
    with pytest.raises(ModelError, match="start it with this adapter"):
        read(world / "own")

"""Rows of single tokens per slot, PEFT's `trainable_token_indices` as oracle, and bases that grew for them."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from typer.testing import CliRunner

from lowrank.adapters.bank import Bank
from lowrank.adapters.token_rows import NAME
from lowrank.adapters.variants.ia3 import IA3Config
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import load_adapter, save_adapter
from lowrank.cli.main import app
from lowrank.errors import ConfigError, ModelError
from lowrank.export.merge.resize_vocabulary import add_tokens
from lowrank.generate.request import GenerationConfig, Prompt
from lowrank.generate.sampler import generate
from lowrank.models.base import Base
from lowrank.pipelines.inference import open_inference_model
from tests.adapters.peft_twins import TOKEN, logits, on_disk
from tests.checkpoint_folder import save_checkpoint_folder
from tests.export.sources import load, source_of, write_merged
from tests.peft_oracle import plain_loss
from tests.pipelines.test_train import run
from tests.tiny_models import make_base, make_engine, make_model, random_step

TOKENS = (60, 5, 90)
MODELS = {"untied": ("llama", False), "tied": ("llama", True), "scaled": ("gemma3", True)}
every_model = pytest.mark.parametrize("model", MODELS)


@pytest.fixture(autouse=True)
def _peft_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tie|tied|save_embedding_layers|Could not find a config).*")
        yield


def config(**others: Any) -> LoraConfig:
    return LoraConfig(rank=3, alpha=6, target_modules=("q_proj",), trainable_token_indices=TOKENS, **others)


def peer(family: str, tied: bool, ours: dict[str, Any]) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    indices: Any = list(TOKENS) if tied else {"embed_tokens": list(TOKENS), "lm_head": list(TOKENS)}
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=indices)
    model = make_model(family, tie_word_embeddings=tied)
    twin = peft.get_peft_model(model, settings, autocast_adapter_dtype=False).eval()
    theirs = {
        key.removeprefix("base_model.model.").replace(".default", ""): value
        for key, value in twin.named_parameters()
        if value.requires_grad
    }
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for key, value in theirs.items():
            value.copy_(ours[key])
    return twin, theirs


def move(parameters: dict[str, torch.nn.Parameter], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in parameters.values():
            value += 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)


@every_model
def test_losses_and_gradients_equal_pefts(model: str) -> None:
    """Beside a job that trains other tokens, and one that trains none."""
    family, tied = MODELS[model]
    tolerance = 1e-6 if family == "gemma3" else 1e-11
    others = LoraConfig(rank=2, target_modules=("q_proj",), trainable_token_indices=(5, 7)), LoraConfig(rank=2)
    engine, slots = make_engine(
        make_base(family, tie_word_embeddings=tied), others[0], config(), others[1], learning_rate=1e-2
    )
    for slot in slots:
        move(engine.bank.parameters(slot), slot)
    ours = engine.bank.parameters(slots[1])
    twin, theirs = peer(family, tied, ours)
    optimizer = torch.optim.AdamW([theirs[key] for key in ours], lr=1e-2, weight_decay=0.0)
    for step in range(3):
        work = {slot: random_step(10 * step + slot, [5, 9, 40]) for slot in slots}
        loss = plain_loss(twin, work[slots[1]])
        loss.backward()
        assert engine.forward_backward(work)[slots[1]].loss == pytest.approx(loss.item(), abs=tolerance)
        for key, value in ours.items():
            assert value.grad is not None
            torch.testing.assert_close(value.grad, theirs[key].grad, rtol=1e-6, atol=tolerance, msg=key)
        torch.nn.utils.clip_grad_norm_([theirs[key] for key in ours], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for slot in slots:
            engine.optim_step(slot, 1e-2)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e3 * tolerance, msg=key)


@every_model
def test_files_both_ways_and_merged(model: str, tmp_path: Path) -> None:
    family, tied = MODELS[model]
    base = make_model(family, tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    bank = Bank(Base(copy.deepcopy(base), None, str(tmp_path / "base")))
    slot = bank.add(config(), seed=0)
    move(bank.parameters(slot))
    ours = logits(bank, slot)
    assert (ours - base(TOKEN).logits).abs().max() > 1e-3
    save_adapter(
        tmp_path / "ours", on_disk(bank, slot), describe_base(bank.base.model, str(tmp_path / "base")), dtype=None
    )
    with torch.no_grad():
        twin = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"), autocast_adapter_dtype=False)
        torch.testing.assert_close(twin(TOKEN).logits, ours, rtol=1e-6, atol=1e-6)
    twin.save_pretrained(str(tmp_path / "theirs"))
    for name in ("ours", "theirs"):
        saved = load_adapter(tmp_path / name)
        assert saved.config.trainable_token_indices == TOKENS
        again = Bank(Base(copy.deepcopy(base), None, family))
        again.load(again.add(saved.config, seed=1), saved.tensors)
        torch.testing.assert_close(logits(again, 0), ours, rtol=1e-9, atol=1e-9)
        out = write_merged(source_of(tmp_path / "base", saved), tmp_path / f"merged {name}")
        with torch.no_grad():
            torch.testing.assert_close(load(out)(TOKEN).logits, ours, rtol=1e-6, atol=1e-6)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == tied
    bank.remove(slot)
    assert bank.add(LoraConfig(rank=2), seed=0) == slot
    torch.testing.assert_close(logits(bank, slot), base(TOKEN).logits, rtol=1e-9, atol=1e-9)


@every_model
def test_answers_know_the_rows(model: str) -> None:
    """Greedy answers equal those of the merged model, beside the bare base."""
    family, tied = MODELS[model]
    engine, (slot,) = make_engine(make_base(family, tie_word_embeddings=tied), config())
    move(engine.bank.parameters(slot))
    twin, _ = peer(family, tied, engine.bank.parameters(slot))
    prompt = torch.tensor([[5, 9, 60, 3]])
    for each, reference in ((slot, twin), (-1, make_model(family, tie_word_embeddings=tied))):
        with torch.no_grad():
            expected = reference.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )[0, 4:]  # fmt: skip
        requested = [Prompt(prompt[0].numpy(), each), Prompt(np.array([4, 4]), slot)]
        found = generate(
            engine.base, engine.bank, requested, GenerationConfig(max_new_tokens=8), stop_tokens=frozenset()
        )
        assert found[0] == expected.tolist()


def test_what_does_not_go_together_is_said() -> None:
    with pytest.raises(ValueError, match="PEFT's files for IA3 have no place for them"):
        IA3Config(trainable_token_indices=TOKENS)
    base = make_base("llama")
    base.tokenizer = SimpleNamespace(get_vocab=dict)
    bank = Bank(base)
    with pytest.raises(ModelError, match=r"lm_head is in target_modules or modules_to_save too") as caught:
        bank.add(config(modules_to_save=("lm_head", "embed_tokens")), seed=0)
    assert "model.embed_tokens is in" in str(caught.value)
    with pytest.raises(ModelError, match=r"97: the embedding has 97 rows; `lowrank vocab`") as caught:
        bank.add(LoraConfig(trainable_token_indices=(97, "<new>")), seed=0)
    assert "'<new>' is not in the vocabulary" in str(caught.value)
    assert not bank.slots
    bank.add(config(), seed=0)
    with pytest.raises(ModelError, match="lm_head: one job adapts it and another trains a copy"):
        bank.add(LoraConfig(modules_to_save=("lm_head",)), seed=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_base_grows_as_transformers_would_have_it(tied: bool, sharded: bool, tmp_path: Path) -> None:
    """Old rows to the bit, new rows the mean, everything else the same file; the original stays as it is."""
    base = save_checkpoint_folder(tmp_path / "base", tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if sharded:
        os.remove(base / "model.safetensors")
        model.save_pretrained(base, max_shard_size="20KB")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    described = CliRunner().invoke(
        app, ["vocab", str(base), "-o", str(tmp_path / "grown"), "-t", "<call>,<end>", "-s", "<x>"]
    )
    assert described.exit_code == 0, described.output
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "grown")
    ids = tokenizer.convert_tokens_to_ids(["<call>", "<end>", "<x>"])
    rows = model.config.vocab_size
    assert ids == [rows, rows + 1, rows + 2]
    assert tokenizer("a<call>b<x>", add_special_tokens=False).input_ids[1::2] == [ids[0], ids[2]]
    assert tokenizer.decode([ids[0], ids[2]], skip_special_tokens=True) == "<call>"
    assert tokenizer.chat_template
    grown = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    model.resize_token_embeddings(rows + 3, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[rows:] = module.weight[:rows].double().mean(0).float()
    assert grown.config.vocab_size == rows + 3
    expected = model.state_dict()
    for name, value in grown.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-7, msg=name)
        if "embed_tokens" not in name and "lm_head" not in name:
            assert torch.equal(value, expected[name])
    if sharded:
        index = json.loads((tmp_path / "grown" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(
            value.numel() * 4 for key, value in expected.items() if not (tied and "lm_head" in key)
        )
        kept = [
            path for path in base.glob("model-*.safetensors") if os.path.samefile(path, tmp_path / "grown" / path.name)
        ]
        assert len(kept) >= len(list(base.glob("model-*.safetensors"))) - (1 if tied else 2)


def test_rows_to_spare_are_taken_first(tmp_path: Path) -> None:
    base = save_checkpoint_folder(tmp_path / "base", vocab_size=280)
    grown = add_tokens(base, tmp_path / "grown", ["<call>"], [])
    assert grown.new_rows == 0
    assert os.path.samefile(base / "model.safetensors", tmp_path / "grown" / "model.safetensors")
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["vocab_size"] == 280


def test_tokens_that_cannot_be_added_are_listed(tmp_path: Path) -> None:
    base = save_checkpoint_folder(tmp_path / "base")
    with pytest.raises(ConfigError) as caught:
        add_tokens(base, tmp_path / "grown", ["a", "<b>", "<b>"], [" "])
    for part in ("'a' is a token already", "'<b>' is named twice", "' ' is blank"):
        assert part in str(caught.value)
    assert not (tmp_path / "grown").exists()


def test_a_run_learns_new_tokens(tmp_path: Path) -> None:
    base = save_checkpoint_folder(tmp_path / "base")
    (token,) = add_tokens(base, tmp_path / "grown", ["<call>"], []).token_ids
    rows = [{"instruction": f"Say {number}", "input": "", "output": f"<call> {number}"} for number in range(24)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    settings: dict[str, Any] = {
        "model": {"path": str(tmp_path / "grown"), "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(tmp_path / "train.json")], "batch_size": 8},
        "adapter": {"rank": 4, "trainable_token_indices": ["<call>"]},
        "optimizer": {"learning_rate": 1e-2},
        "output_dir": str(tmp_path / "run"),
        "max_steps": 4,
    }
    run(settings)
    fields = json.loads((tmp_path / "run/default/last/adapter_config.json").read_text())
    assert fields["trainable_token_indices"] == {"model.embed_tokens": [token]}
    trained = open_inference_model(str(tmp_path / "run"), which="last", notify=str)
    assert trained.base.tokenizer.decode([token]) == "<call>"
    (row_ND,) = [
        value for key, value in trained.bank.parameters(trained.slots["default"]).items() if key.endswith(NAME)
    ]
    assert (row_ND - trained.base.model.get_input_embeddings().weight[token]).abs().max() > 1e-3
    before = {**settings, "model": {**settings["model"], "path": str(base)}, "output_dir": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match="'<call>' is not in the vocabulary; `lowrank vocab` adds it"):
        run(before)

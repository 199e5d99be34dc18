"""Weights of the base in PEFT's adapter files, at every door that an adapter comes in by; PEFT as the oracle."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lowrank.adapters.bank import Bank
from lowrank.batches import pack
from lowrank.cli.main import main
from lowrank.compat.unsloth import FastLanguageModel
from lowrank.config import validate_settings
from lowrank.errors import LowrankError, ModelError
from lowrank.generate.adapter_registry import AdapterRegistry
from lowrank.generate.generator import Generator
from lowrank.generate.request import GenerationConfig
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load
from lowrank.pipelines.export_source import open_source
from lowrank.pipelines.inference import open_inference_model
from lowrank.pipelines.memory_plan import planned_jobs
from lowrank.pipelines.train import train
from lowrank.records import Conversation, Message
from lowrank.segments import Segment
from lowrank.serve.adapter_cache import AdapterCache
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.vllm_engine.adapters import refuse_own_rows
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca
from tests.command_line import lowrank
from tests.tiny_models import random_step

SPARE = 5
"""A token whose row the adapter's maker had changed before training."""


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; `own`: an adapter trained on it with another row in its embedding; `added`: one with two tokens more."""
    folder = tmp_path_factory.mktemp("world")
    save_checkpoint_folder(folder / "base", tie_word_embeddings=request.param)
    write_alpaca(folder / "train.json", 8)
    for name, more in (("own", 0), ("added", 2)):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        if more:
            model.resize_token_embeddings(259 + more)
        else:
            with torch.no_grad():
                model.get_input_embeddings().weight[SPARE] += 0.5
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned.save_pretrained(str(folder / name), save_embedding_layers=True)
        fields = json.loads((folder / name / "adapter_config.json").read_text())
        fields["base_model_name_or_path"] = str(folder / "base")
        (folder / name / "adapter_config.json").write_text(json.dumps(fields))
        assert any("embed_tokens" in key for key in load_file(folder / name / "adapter_model.safetensors"))
        if not more:
            token = torch.tensor([[*random_step(0, [12])[0].token_L.tolist(), SPARE]])
            torch.save({"token": token, "logits": tuned.eval()(token).logits[0].detach()}, folder / "expected.pt")
    return folder


def logits(base: Any, bank: Bank, slot: int, token_1T: torch.Tensor) -> torch.Tensor:
    """Of our engine."""
    segment = Segment(token_1T[0].numpy(), np.zeros(token_1T.shape[1], np.float32))
    with torch.no_grad():
        return bank.head(slot).logits(bank.hidden(pack([(slot, segment)])))


def test_chat_reads_the_adapter_s_own_rows(world: Path) -> None:
    described: list[str] = []
    trained = open_inference_model(str(world / "own"), notify=described.append)
    known = torch.load(world / "expected.pt")
    ours = logits(trained.base, trained.bank, trained.slot("own"), known["token"])
    bare = logits(trained.base, trained.bank, -1, known["token"])
    apart, without = ((each.float() - known["logits"])[-1].abs().max() for each in (ours, bare))  # maybe in bfloat16
    assert apart < 0.1 * without
    assert any("they are the adapter's own" in text for text in described)


def test_export_merges_them(world: Path, tmp_path: Path) -> None:
    done = lowrank("export", str(world / "own"), "--to", "merged", "-o", str(tmp_path / "m"))
    assert done.returncode == 0, done.stdout + done.stderr
    known = torch.load(world / "expected.pt")
    written = next((tmp_path / "m").rglob("config.json")).parent
    model = transformers.AutoModelForCausalLM.from_pretrained(written)
    torch.testing.assert_close(model(known["token"]).logits[0], known["logits"], rtol=0, atol=1e-4)


def test_training_goes_on_from_them(world: Path, tmp_path: Path) -> None:
    given = {
        "model": {"path": str(world / "base"), "dtype": "float32"}, "adapter": {"path": str(world / "own")},
        "data": {"train": str(world / "train.json")}, "max_steps": 1, "output_dir": str(tmp_path / "run"),
        "optimizer": {"learning_rate": 1e-9, "weight_decay": 0.0}, "ignore_memory_plan": True, "save_steps": None,
    }  # fmt: skip
    train(validate_settings(given))
    saved = load_file(tmp_path / "run" / "default" / "last" / "adapter_model.safetensors")
    theirs = load_file(world / "own" / "adapter_model.safetensors")
    row = next(value for name, value in theirs.items() if "embed_tokens" in name)[SPARE]
    own = next(value for name, value in saved.items() if "embed_tokens" in name)
    torch.testing.assert_close(own[SPARE], row, rtol=0, atol=1e-5)


def test_unsloth_front(world: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(world / "own"), 512, torch.float32, False)
    known = torch.load(world / "expected.pt")
    with torch.no_grad():
        ours = model.eval()(input_ids=known["token"]).logits[0]
    torch.testing.assert_close(ours, known["logits"], rtol=0, atol=1e-4)


def _never(*arguments: Any, **how: Any) -> Any:
    raise AssertionError("the base was loaded")


@pytest.mark.parametrize("command", ["train", "plan", "chat", "serve", "predict"])
def test_added_tokens_are_refused_before_the_base_loads(
    command: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lowrank.models.loading.pretrained.load", _never)
    settings = [f"model={world / 'base'}", f"adapter.path={world / 'added'}", f"data={world / 'train.json'}",
                f"output_dir={tmp_path / 'run'}", "max_steps=1"]  # fmt: skip
    own = {
        "train": settings, "plan": settings, "chat": [str(world / "added"), "-p", "Hi"],
        "serve": [str(world / "added"), "--port", "0"],
        "predict": [str(world / "added"), "--data", str(world / "train.json")],
    }  # fmt: skip
    with pytest.raises(SystemExit) as left:
        main([command, *own[command]])
    output = capsys.readouterr()
    assert left.value.code == 4, output
    assert "2 tokens were added" in output.err


def test_predict_and_a_folder_of_adapters_read_the_adapter_s_own_rows(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", str(world / "own"), "--data", str(world / "train.json"), "--metrics", "none",
             "--max-samples", "2", "--max-new-tokens", "2", "--output", str(tmp_path)]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        main(arguments)
    output = capsys.readouterr()
    assert left.value.code in (0, None), output
    assert "they are the adapter's own" in output.err
    served: list[Any] = []
    monkeypatch.setattr("lowrank.serve.server.run", lambda engine, **how: served.append(engine))
    for name in ("own", "added"):
        shutil.copytree(world / name, tmp_path / "adapters" / name)
    with pytest.raises(SystemExit) as left:
        main(["serve", str(world / "base"), "--port", "0", "--adapters", str(tmp_path / "adapters")])
    assert left.value.code in (0, None), capsys.readouterr()
    engine = served[0]
    assert sorted(each.name for each in engine.served_models()) == ["added", "base", "own"]
    question = Conversation((Message("user", "Hello"),))
    (answer,) = engine.submit("own", question, [GenerationConfig(max_new_tokens=1, temperature=0)])
    answer.cancel()
    slot = engine.generator.bank.slots[engine.cache.published._slot_of("own")]
    assert "model.embed_tokens" in slot.config.modules_to_save
    with pytest.raises(ApiError, match=r"2 tokens were added .*lowrank vocab"):
        engine.submit("added", question, [GenerationConfig(max_new_tokens=1, temperature=0)])


def test_a_plan_counts_what_an_adapter_brings_of_the_base(world: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("own", "plain"):
        place = tmp_path / name
        shutil.copytree(world / "own", place)
        if name == "plain":
            tensors = load_file(place / "adapter_model.safetensors")
            kept = {key: value for key, value in tensors.items() if "embed_tokens" not in key and "lm_head" not in key}
            save_file(kept, place / "adapter_model.safetensors", metadata={"format": "pt"})
        config = validate_settings({"model": {"path": str(world / "base"), "dtype": "float32", "device": "cpu"},
                          "adapter": {"path": str(place)}, "data": {"train": str(world / "train.json")},
                          "max_steps": 1, "output_dir": str(tmp_path / "run")})  # fmt: skip
        data = [SimpleNamespace(train=Steps())]
        (found[name],) = planned_jobs(config, data)  # pyright: ignore[reportArgumentType]
    assert "model.embed_tokens" in found["own"].adapter.modules_to_save
    assert found["plain"].adapter.modules_to_save == ()


class Steps:
    """Of a dataloader, what is planned with."""

    def heaviest_step(self) -> list[Segment]:
        return random_step(0, [12])

    def tokens_of_steps(self) -> list[int]:
        return [12]


def test_added_tokens_are_refused_at_every_door(world: Path, tmp_path: Path) -> None:
    added, wanted = str(world / "added"), r"2 tokens were added .*lowrank vocab"
    with pytest.raises(ModelError, match=wanted):
        open_inference_model(added, notify=lambda _: None)
    with pytest.raises(ModelError, match=wanted):
        open_source(added, notify=lambda _: None)
    with pytest.raises(LowrankError, match=wanted):
        FastLanguageModel.from_pretrained(added, 512, torch.float32, False)
    with pytest.raises(ModelError, match=wanted):
        refuse_own_rows(world / "added", ModelConfig(path=str(world / "base")))
    with pytest.raises(ModelError, match="which vLLM leaves out"):
        refuse_own_rows(world / "own", ModelConfig(path=str(world / "base")))
    base = load(ModelConfig(path=str(world / "base"), dtype="float32"), notify=lambda _: None)
    shelf = AdapterCache(AdapterRegistry(Generator(base, Bank(base)), {"base": -1}), {}, [world], max_loras=4)
    with pytest.raises(ApiError, match=wanted):
        shelf.publish("new", added)
    given = {
        "model": str(world / "base"), "adapter": {"path": added}, "data": {"train": str(world / "train.json")},
        "max_steps": 1, "output_dir": str(tmp_path / "run"), "ignore_memory_plan": True,
    }  # fmt: skip
    with pytest.raises(ModelError, match=wanted):
        train(validate_settings(given))

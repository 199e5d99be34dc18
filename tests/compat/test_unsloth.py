"""Unsloth's front: TRL and transformers train it as they train PEFT, and what it saves is what was trained."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lowrank.compat.unsloth import FastLanguageModel, is_bfloat16_supported
from lowrank.compat.unsloth.chat_templates import train_on_responses_only
from lowrank.errors import ConfigError, DataError, ModelError
from lowrank.models.loading.pretrained import TINY, locate

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of TRL, about its own settings
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load(dtype: Any = torch.float32, load_in_4bit: bool = False, **settings: Any) -> Any:
    model, _ = FastLanguageModel.from_pretrained(TINY, 512, dtype, load_in_4bit, device_map="cpu")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings}
    return FastLanguageModel.get_peft_model(model, **settings)


def peft_twin(ours: Any, **settings: Any) -> Any:
    """PEFT's model with the same adapter on the same base."""
    base = AutoModelForCausalLM.from_pretrained(locate(TINY), dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **settings)
    twin = get_peft_model(base, config)
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(own[name])  # the names are PEFT's
    return twin


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(locate(TINY))


def texts() -> Dataset:
    end = tokenizer().eos_token
    requested = "### Instruction:\nadd {} and {}{}\n\n### Response:\n{}"
    rows = [requested.format(i, i % 7, " please" * (i % 3), i + i % 7) for i in range(40)]
    return Dataset.from_list([{"text": row + end} for row in rows])


def arguments(kind: type[Any], folder: Path, **settings: Any) -> Any:
    common = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4,
        "learning_rate": 5e-3, "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "seed": 1,
        "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    return kind(**{**common, **settings})


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(model: Any, folder: Path, **settings: Any) -> Any:
    config = arguments(SFTConfig, folder, dataset_text_field="text", max_length=64, **settings)
    return SFTTrainer(model=model, processing_class=tokenizer(), train_dataset=texts(), args=config)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_sft_is_that_of_peft(checkpointing: bool, tmp_path: Path) -> None:
    ours = load(use_gradient_checkpointing=False)
    theirs = peft_twin(ours)
    found = []
    for model in (ours, theirs):
        trainer = sft(model, tmp_path, gradient_checkpointing=checkpointing)
        trainer.train()
        found.append(losses(trainer))
    assert found[0][-1] < found[0][0] - 0.5
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert (own[name] - parameter).norm() <= 1e-4 * parameter.norm(), name  # AdamW magnifies single roundings


def as_rows(tokens: Callable[[], Any]) -> Dataset:
    rows = tokens()(texts()["text"][:], padding=True)
    labels = [[t if seen else -100 for t, seen in zip(row, mask)]
              for row, mask in zip(rows["input_ids"], rows["attention_mask"])]  # fmt: skip
    return Dataset.from_dict({**rows, "labels": labels})


def test_plain_trainer_is_that_of_peft_and_makes_no_logits(tmp_path: Path) -> None:
    ours = load()
    theirs = peft_twin(ours)
    found = []
    for model in (ours, theirs):
        trainer = Trainer(model=model, train_dataset=as_rows(tokenizer), args=arguments(TrainingArguments, tmp_path))
        trainer.train()
        found.append([*losses(trainer), trainer.evaluate(as_rows(tokenizer))["eval_loss"]])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    row = {key: torch.tensor(value)[None] for key, value in as_rows(tokenizer)[0].items()}
    assert ours.train()(**row).logits is None
    assert ours.eval()(**row).logits is not None


def test_dropout_is_drawn_in_training_alone_and_again_in_recomputation() -> None:
    row = {key: torch.tensor(value)[None] for key, value in as_rows(tokenizer)[0].items()}
    gradients = []
    for checkpointing in (True, False):
        model = load(lora_dropout=0.3, use_gradient_checkpointing=checkpointing)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 if parameter.requires_grad else 0.0
        assert torch.equal(model.eval()(**row).loss, model(**row).loss)
        model.train()
        with torch.no_grad():
            plain = model(**row).loss
        loss = model(**row).loss
        assert loss != plain
        with torch.no_grad():
            model(**{key: value[:, :9] for key, value in row.items()})  # another pass comes between
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])


def test_sixteen_bit_copies_follow_the_masters(tmp_path: Path) -> None:
    model = load(dtype=torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    sft(model, tmp_path / "run", bf16=True).train()
    model.save_pretrained(tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), 512, torch.bfloat16, False)
    row = torch.tensor([[5, 9, 11, 3, 8]])
    with torch.no_grad():
        assert torch.equal(model.eval()(row).logits, again.eval()(row).logits)
        with model.disable_adapter():
            assert not torch.equal(model(row).logits, again(row).logits)


def test_peft_reads_what_is_saved(tmp_path: Path) -> None:
    model = load(use_rslora=True, rank_pattern={"v_proj": 2})
    sft(model, tmp_path / "run").train()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/notes.txt").write_text("mine")
    model.save_pretrained(tmp_path / "adapter", tokenizer=tokenizer())
    assert (tmp_path / "adapter/notes.txt").read_text() == "mine"
    base = AutoModelForCausalLM.from_pretrained(locate(TINY), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    row = torch.tensor([[5, 9, 11, 3, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(row).logits, theirs(row).logits, rtol=1e-4, atol=1e-4)
    assert model.peft_config["default"].use_rslora


def test_a_trainer_resumes(tmp_path: Path) -> None:
    whole = sft(load(), tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    again = sft(load(random_state=5), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert losses(again) == pytest.approx(losses(whole), abs=1e-6)


def test_dpo_is_that_of_peft(tmp_path: Path) -> None:
    """The reference is a second adapter, and another pass comes between forward and backward."""
    pairs = Dataset.from_list(
        [{"prompt": f"add {i} and 2: ", "chosen": f"{i + 2}", "rejected": f"{i} no"} for i in range(16)]
    )
    ours = load()
    theirs = peft_twin(ours)
    found = []
    for model in (ours, theirs):
        config = arguments(DPOConfig, tmp_path, max_length=64, gradient_checkpointing=True, beta=0.5)
        trainer = DPOTrainer(model=model, processing_class=tokenizer(), train_dataset=pairs, args=config)
        trainer.train()
        found.append(losses(trainer))
    assert found[0][0] == pytest.approx(0.6931, abs=1e-3)
    assert found[0][-1] < 0.6
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.slow
def test_four_bits_train_and_are_merged_and_kept(tmp_path: Path) -> None:
    model = load(load_in_4bit=True)
    trained, total = model.get_nb_trainable_parameters()
    assert total > 2_500_000 > 10 * trained
    trainer = sft(model, tmp_path / "run", learning_rate=1e-2)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    model.save_pretrained_merged(tmp_path / "home/merged", tokenizer(), save_method="merged_16bit")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "home/merged")
    assert merged.dtype == torch.bfloat16
    model.save_pretrained_merged(tmp_path / "home/packed", tokenizer(), save_method="merged_4bit")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "home/packed"), 512, torch.float32, load_in_4bit=True)
    row = torch.tensor([[5, 9, 11, 3, 8]])
    with torch.no_grad():
        difference = (again.eval()(row).logits - merged(row).logits.float()).abs().mean()
    assert 0 < difference < 0.5


def test_loftq_starts_nearer_to_the_original() -> None:
    row = torch.tensor([[5, 9, 11, 3, 8]])
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(locate(TINY), dtype=torch.float32)(row).logits
        errors = [
            (load(load_in_4bit=True, r=16, **start).eval()(row).logits - exact).norm()
            for start in ({}, {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}})
        ]
    assert errors[1] < 0.95 * errors[0]


def test_a_push_can_be_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    model = load()
    assert model.push_to_hub("somebody/adapter", dry_run=True)["repository"] == "somebody/adapter"
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        model.push_to_hub("somebody/adapter")
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        model.push_to_hub_gguf("somebody/adapter", tokenizer(), token="")


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (
            lambda: FastLanguageModel.from_pretrained(TINY, load_in_4bit=True, full_finetuning=True),
            "keeps them rounded",
        ),
        (lambda: FastLanguageModel.from_pretrained(TINY, load_in_4bit=True, load_in_8bit=True), "choose one"),
        (lambda: FastLanguageModel.from_pretrained(TINY, load_in_fp8=True), "load_in_fp8=True"),
        (lambda: FastLanguageModel.from_pretrained(TINY, qat_scheme="int4"), "quantization-aware"),
        (lambda: FastLanguageModel.from_pretrained(TINY, auto_model=AutoModelForSequenceClassification), "CausalLM"),
        (lambda: FastLanguageModel.from_pretrained(TINY, device_map={"a": 0, "b": 1}), "one device"),
        (lambda: load(finetune_language_layers=False), "finetune_language_layers"),
        (lambda: load(task_type="SEQ_CLS"), "task_type='SEQ_CLS'"),
        (lambda: FastLanguageModel.from_pretrained(TINY, max_sequence=3), "max_sequence=3: no such argument"),
        (lambda: load(bias="all"), "bias='all'"),
        (lambda: load(layers_to_transform=[1]), "layers_to_transform"),
        (lambda: load(use_rslora=True, use_dora=True), "cannot be combined"),
        (lambda: load(r=0), "rank"),
        (lambda: load(init_lora_weights="eva"), "init_lora_weights='eva'"),
        (lambda: load().save_pretrained_merged("x", save_method="merged"), "save_method='merged'"),
        (lambda: load().save_pretrained_merged("x", save_method="mxfp4"), "read, not written"),
        (lambda: load().save_pretrained_gguf("x", quantization_method="q9"), "quantization_method='q9'"),
        (lambda: load().save_pretrained("x", path_initial_model="y"), "path_initial_model"),
        (lambda: load().merge_and_unload(), "save_pretrained_merged"),
    ],
)
def test_what_is_not_honored_is_named(call: Callable[[], Any], named: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=named):
        call()


def test_too_long_is_said(caplog: pytest.LogCaptureFixture) -> None:
    FastLanguageModel.from_pretrained(TINY, 4096, load_in_4bit=False)
    assert "1024" in caplog.text
    assert isinstance(is_bfloat16_supported(), bool)


def test_responses_only(tmp_path: Path) -> None:
    trainer = sft(load(), tmp_path)
    train_on_responses_only(trainer, "### Instruction:\n", "### Response:\n")
    row = trainer.train_dataset[8]
    learned = [token for token, label in zip(row["input_ids"], row["labels"]) if label != -100]
    assert tokenizer().decode(learned) == "9" + tokenizer().eos_token
    trainer.train()
    with pytest.raises(DataError, match="no row of the training data"):
        train_on_responses_only(sft(load(), tmp_path), "### Instruction:\n", "### Reply:\n")


@pytest.mark.slow
def test_the_notebook(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples/unsloth_alpaca.py"), "6", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    first, last = (float(number) for number in done.stdout.partition("loss: ")[2].split()[0:4:3])
    assert last < first
    assert "saved: gguf, lora_model, merged, outputs" in done.stdout
    assert list((tmp_path / "gguf").glob("*-Q8_0.gguf"))


def test_positions_are_stretched_when_asked() -> None:
    with pytest.raises(ConfigError, match="rope_scaling"):
        FastLanguageModel.from_pretrained(TINY, rope_scaling={"type": "dynamic", "factor": 2.0})
    plain = load()
    stretched, _ = FastLanguageModel.from_pretrained(
        TINY, 4096, torch.float32, load_in_4bit=False, rope_scaling={"type": "linear", "factor": 2.0}
    )
    reach = plain.base.max_positions
    assert reach is not None
    assert stretched.base.max_positions == 2 * reach
    token_1T = torch.arange(5, 25)[None]
    with torch.no_grad():
        halved = plain.base.model(token_1T, position_ids=torch.arange(20)[None] / 2).logits
        torch.testing.assert_close(stretched.base.model(token_1T).logits, halved, rtol=1e-4, atol=1e-4)

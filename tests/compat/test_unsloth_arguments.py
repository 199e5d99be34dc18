"""What older trainers took: read as the present ones have it, said, and the same training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from lowrank.compat.unsloth import FastLanguageModel, SamplingParams, UnslothTrainer, UnslothTrainingArguments
from lowrank.compat.unsloth import arguments as loader_arguments
from lowrank.compat.unsloth import trl_arguments as translation
from lowrank.compat.unsloth.trl_data import prepare, shorten_prompts
from lowrank.errors import ConfigError
from tests.compat.test_unsloth import arguments, load, losses, peft_twin, sft, texts, tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]
NO_GPU = not torch.accelerator.is_available()


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation, "_logged", set())
    monkeypatch.setattr(loader_arguments, "_logged", set())


def test_settings_by_their_older_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = SFTConfig(str(tmp_path), max_seq_length=77, warmup_ratio=0.1, evaluation_strategy="steps", eval_steps=3)
    assert (made.output_dir, made.max_length, made.warmup_steps) == (str(tmp_path), 77, 0.1)
    assert made.eval_strategy == "steps"
    assert "SFTConfig: warmup_ratio is warmup_steps in this release" in caplog.text
    caplog.clear()
    assert SFTConfig(str(tmp_path), warmup_ratio=0.2).warmup_steps == 0.2
    assert "warmup_ratio" not in caplog.text, "it is said once"
    assert SFTConfig(str(tmp_path), warmup_ratio=0.1, warmup_steps=5).warmup_steps == 5, "steps win, as ever"
    with pytest.raises(TypeError, match="max_sequence_length"):
        SFTConfig(str(tmp_path), max_sequence_length=3)


@pytest.mark.skipif(not NO_GPU, reason="what is said where there is no GPU")
def test_without_a_gpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = TrainingArguments(str(tmp_path), fp16=True)
    assert made.use_cpu
    assert not made.fp16
    assert "there is no GPU: use_cpu=True" in caplog.text
    assert SFTConfig(str(tmp_path)).bf16 is False
    assert SFTConfig(str(tmp_path), use_cpu=True, bf16=True).bf16 is True, "what is said is done"


def test_group_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = SamplingParams(min_p=0.1, top_p=1.0, top_k=-1, seed=3407, stop=[tokenizer().eos_token])
    made = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=1, num_generations=4,
        max_prompt_length=9, use_vllm=True, vllm_sampling_params=params, temperature=0.7,
    )  # fmt: skip
    assert (made.per_device_train_batch_size, made.min_p, made.temperature) == (4, 0.1, 0.7)
    assert made.use_vllm, "other models than this front's may ask vLLM"
    assert made.max_prompt_length == 9
    trainer = GRPOTrainer(load(), [lambda completions, **others: [0.0] * len(completions)], made, texts().rename_column(
        "text", "prompt"), processing_class=tokenizer())  # fmt: skip
    assert trainer.args.use_vllm is False
    assert "no vLLM is started" in caplog.text
    assert max(map(len, trainer._tokenize_prompts(texts()["text"][:4])[0])) == 9
    params.stop = ["</answer>"]
    with pytest.raises(ConfigError, match="alone ends an answer; leave"):
        GRPOTrainer(load(), [len], made, texts(), processing_class=tokenizer())
    with pytest.raises(ConfigError, match="presence_penalty=1"):
        GRPOConfig(str(tmp_path), vllm_sampling_params=SamplingParams(presence_penalty=1.0))
    whole = GRPOConfig(str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, num_generations=4)
    assert whole.per_device_train_batch_size == 2, "two times two is a group"


def test_the_old_trainer_call_is_the_new_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The founding notebook's cell, twice, beside TRL's present way with PEFT."""
    plain = arguments(TrainingArguments, tmp_path, optim="adamw_8bit", max_steps=2)
    ours = load()
    twin = peft_twin(ours)
    found = []
    for model in (ours, twin):
        trainer = SFTTrainer(
            model=model, tokenizer=tokenizer(), train_dataset=texts(), dataset_text_field="text", max_seq_length=24,
            dataset_num_proc=None, packing=False, args=plain,
        )  # fmt: skip
        assert trainer.args.max_length == 24
        assert max(map(len, trainer.train_dataset["input_ids"])) <= 24
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert (
        "SFTTrainer: dataset_text_field, max_seq_length, dataset_num_proc, packing: given to SFTConfig" in caplog.text
    )
    assert not isinstance(plain, SFTConfig), "the person's own settings stay as they were"


def test_length_is_that_of_the_model(tmp_path: Path) -> None:
    model = load()
    model.max_seq_length = 11
    assert sft(model, tmp_path).args.max_length == 64, "what is said is done"
    trainer = SFTTrainer(model=model, tokenizer=tokenizer(), train_dataset=texts(), args=arguments(SFTConfig, tmp_path))
    assert max(map(len, trainer.train_dataset["input_ids"])) == 11


def test_rows_are_read_as_unsloth_reads_them() -> None:
    turns = [{"role": "user", "content": "hidden"}]
    rows = Dataset.from_list([{"messages": turns, "text": "seen"}])
    assert prepare(rows, "text", tokenizer()).column_names == ["text"], "TRL would read the conversation"

    def of_a_batch(rows: Any) -> list[str]:
        return [f"{a}+{b}" for a, b in zip(rows["a"], rows["b"])]

    columns = Dataset.from_list([{"a": "1", "b": "2"}, {"a": "3", "b": "4"}])
    assert prepare(columns, "text", tokenizer(), of_a_batch)["text"][:] == ["1+2", "3+4"]
    assert prepare(columns, "text", tokenizer(), lambda row: row["a"] + row["b"]) is columns, "TRL calls that itself"
    pairs = Dataset.from_list([{"prompt": "a", "completion": "b", "text": "c"}])
    assert prepare(pairs, "text", tokenizer()) is pairs


class _Trainer:
    def __init__(self, **row: Any) -> None:
        self.train_dataset, self.eval_dataset = Dataset.from_list([row]), None


def test_prompts_are_cut_at_their_beginning() -> None:
    apart = _Trainer(prompt_ids=[1, 2, 3], chosen_ids=[4], rejected_ids=[5, 6])
    shorten_prompts(apart, 2)
    assert apart.train_dataset[0] == {"prompt_ids": [2, 3], "chosen_ids": [4], "rejected_ids": [5, 6]}
    repeated = _Trainer(
        prompt="abc", prompt_input_ids=[1, 2, 3], chosen_input_ids=[1, 2, 3, 4], chosen_labels=[-100, -100, -100, 4],
        rejected_input_ids=[1, 2, 3, 5, 6], rejected_attention_mask=[1] * 5,
    )  # fmt: skip
    shorten_prompts(repeated, 2)
    assert repeated.train_dataset[0] == {
        "prompt": "abc", "prompt_input_ids": [2, 3], "chosen_input_ids": [2, 3, 4], "chosen_labels": [-100, -100, 4],
        "rejected_input_ids": [2, 3, 5, 6], "rejected_attention_mask": [1] * 4,
    }  # fmt: skip


def test_one_bos_is_left(caplog: pytest.LogCaptureFixture) -> None:
    class WithBos:
        bos_token, bos_token_id = "<s>", 1

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, *map(ord, text)]}

    rows = Dataset.from_list([{"text": "<s>one"}, {"text": "<s>two"}])
    assert prepare(rows, "text", WithBos())["text"][:] == ["one", "two"]
    assert "begin with BOS" in caplog.text
    assert prepare(Dataset.from_list([{"text": "one <s>"}]), "text", WithBos())["text"][:] == ["one <s>"]


def test_embeddings_have_a_rate_of_their_own(tmp_path: Path) -> None:
    """Copies of embedding and head are trained through TRL's loss as PEFT trains them."""
    ours = load(target_modules=["q_proj", "lm_head", "embed_tokens"])
    assert set(ours.peft_config["default"].modules_to_save) == {"lm_head", "embed_tokens"}
    twin = twin_with_copies(ours)
    found = []
    for model in (ours, twin):
        config = arguments(
            UnslothTrainingArguments, tmp_path, embedding_learning_rate=1e-3, max_length=64, max_steps=3,
            gradient_accumulation_steps=1,
        )  # fmt: skip
        trainer = UnslothTrainer(model=model, tokenizer=tokenizer(), train_dataset=texts(), args=config)
        trainer.train()
        groups = trainer.optimizer.param_groups
        assert [(len(each["params"]), each["initial_lr"]) for each in groups][1] == (2, 1e-3)
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], abs=2e-4)
    theirs = dict(twin.named_parameters())
    for name, own in ours.named_parameters():
        if own.requires_grad and "modules_to_save" in name:
            torch.testing.assert_close(own, theirs[name], rtol=1e-3, atol=1e-4)


def twin_with_copies(ours: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lowrank.models.loading.pretrained import TINY, locate

    base = AutoModelForCausalLM.from_pretrained(locate(TINY), dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"],
                        task_type="CAUSAL_LM")  # fmt: skip
    twin = get_peft_model(base, config)
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(own[name])
    return twin


def test_peft_loads_with_the_older_words(tmp_path: Path) -> None:
    load().save_pretrained(tmp_path)
    again = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path), load_in_4bit=False)
    assert "default" in again.peft_config


def test_arguments_of_the_loader_that_choose_nothing(caplog: pytest.LogCaptureFixture) -> None:
    FastLanguageModel.from_pretrained(
        "lowrank/tiny", max_seq_length=64, load_in_4bit=False, fast_inference=True, max_lora_rank=32,
        gpu_memory_utilization=0.9, offload_embedding=True, device_map={"": "cpu"}, unsloth_force_compile=True,
        token="", torch_dtype=torch.float32,
    )  # fmt: skip
    assert "fast_inference has no effect: vLLM's" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING

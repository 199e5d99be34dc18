"""Trainings of each kind that Unsloth's notebooks have, as they are written there: ours and TRL's with PEFT on the same
cells end in the same losses. The cells are ours; kinds, names and arguments are the notebooks'."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, TrainingArguments, set_seed

from lowrank.compat.unsloth import (
    FastLanguageModel,
    PatchDPOTrainer,
    SamplingParams,
    UnslothTrainer,
    UnslothTrainingArguments,
    apply_chat_template,
    get_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
    train_on_responses_only,
)
from lowrank.models.loading.pretrained import TINY, locate
from tests.compat.test_unsloth import load, losses, peft_twin, tokenizer
from tests.compat.test_unsloth_arguments import twin_with_copies

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
COMMON = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 5e-3,
    "logging_steps": 1, "optim": "adamw_8bit", "weight_decay": 0.001, "lr_scheduler_type": "linear", "seed": 3407,
    "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
SHAREGPT = [[{"from": "human", "value": f"add {i} and 3"}, {"from": "gpt", "value": f"{i + 3}"}] * 2 for i in range(24)]


def rows(end: str = "") -> Dataset:
    return Dataset.from_list([{"text": f"add {i} and 3: {i + 3}{end}", "meta": i} for i in range(24)])


def settings(kind: Any, folder: Path, **others: Any) -> Any:
    return kind(output_dir=str(folder), **{**COMMON, **others})


def alpaca(model: Any, folder: Path) -> Any:
    own = tokenizer()
    return trl.SFTTrainer(
        model=model, tokenizer=own, train_dataset=rows(own.eos_token), dataset_text_field="text", max_seq_length=64,
        dataset_num_proc=2, packing=False, args=settings(TrainingArguments, folder, warmup_steps=1, fp16=False),
    )  # fmt: skip


def conversations(model: Any, folder: Path) -> Any:
    own = get_chat_template(tokenizer(), chat_template="qwen-2.5")
    data = standardize_sharegpt(Dataset.from_dict({"conversations": SHAREGPT}))
    data = data.map(lambda each: {"text": own.apply_chat_template(each["conversations"], tokenize=False)})
    trainer = trl.SFTTrainer(
        model=model, tokenizer=own, train_dataset=data, dataset_text_field="text", max_seq_length=64,
        data_collator=DataCollatorForSeq2Seq(tokenizer=own), packing=False, args=settings(trl.SFTConfig, folder),
    )  # fmt: skip
    return train_on_responses_only(
        trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n"
    )


def parts_unsaid(model: Any, folder: Path) -> Any:
    own = get_chat_template(tokenizer(), chat_template="chatml")
    data = standardize_data_formats(Dataset.from_dict({"conversations": SHAREGPT}))
    data = data.map(
        lambda batch: {"text": [own.apply_chat_template(each, tokenize=False) for each in batch["conversations"]]},
        batched=True,
    )
    trainer = trl.SFTTrainer(
        model=model, tokenizer=own, train_dataset=data, eval_dataset=None,
        args=settings(trl.SFTConfig, folder, dataset_text_field="text", warmup_steps=1),
    )  # fmt: skip
    return train_on_responses_only(trainer, num_proc=1)


def other_keys(model: Any, folder: Path) -> Any:
    own = get_chat_template(
        tokenizer(), chat_template="chatml",
        mapping={"role": "from", "content": "value", "user": "human", "assistant": "gpt"}, map_eos_token=True,
    )  # fmt: skip
    texts = [own.apply_chat_template(each, tokenize=False, add_generation_prompt=False) for each in SHAREGPT]
    return trl.SFTTrainer(
        model=model, tokenizer=own, train_dataset=Dataset.from_dict({"text": texts}), dataset_text_field="text",
        max_seq_length=48, args=settings(trl.SFTConfig, folder),
    )  # fmt: skip


def by_example(model: Any, folder: Path) -> Any:
    own = tokenizer()
    columns = [{"instruction": f"add {i}", "input": "" if i % 2 else "and 3", "output": str(i + 3)} for i in range(24)]
    data = to_sharegpt(
        Dataset.from_list(columns), merged_prompt="{instruction}[[\nYour input is:\n{input}]]",
        output_column_name="output", conversation_extension=3,
    )  # fmt: skip
    data = apply_chat_template(
        standardize_sharegpt(data), tokenizer=own, chat_template="Tasks.\n\n>>> {INPUT}\n\n<<< {OUTPUT}"
    )
    return trl.SFTTrainer(
        model=model, tokenizer=own, train_dataset=data, dataset_text_field="text", max_seq_length=64,
        args=settings(trl.SFTConfig, folder),
    )  # fmt: skip


def evaluated(model: Any, folder: Path) -> Any:
    own = tokenizer()
    return trl.SFTTrainer(
        model=model, tokenizer=own, train_dataset=rows(), eval_dataset=rows().select(range(4)),
        args=settings(
            TrainingArguments, folder, eval_strategy="steps", eval_steps=1, lr_scheduler_type="cosine",
            gradient_checkpointing=True, optim="adamw_torch",
        ),
    )  # fmt: skip


def packed(model: Any, folder: Path) -> Any:
    own = tokenizer()
    return trl.SFTTrainer(
        model=model, tokenizer=own, train_dataset=rows(own.eos_token), dataset_text_field="text", max_seq_length=64,
        packing=True, args=settings(trl.SFTConfig, folder, warmup_ratio=0.1),
    )  # fmt: skip


def of_a_batch(model: Any, folder: Path) -> Any:
    def formatting(example: Any) -> list[str]:
        return [f"### Problem: {p}\n ### Response: {g}" for p, g in zip(example["problem"], example["generation"])]

    def of_a_row(example: Any) -> str:
        return formatting({name: [value] for name, value in example.items()})[0]

    data = Dataset.from_list([{"problem": f"add {i} and 3", "generation": str(i + 3)} for i in range(24)])
    return trl.SFTTrainer(
        model=model, tokenizer=tokenizer(), train_dataset=data, max_seq_length=64,
        formatting_func=formatting if hasattr(model, "is_front_of_lowrank") else of_a_row,
        packing=False, args=settings(trl.SFTConfig, folder),
    )  # fmt: skip


def continued(model: Any, folder: Path) -> Any:
    return UnslothTrainer(
        model=model, tokenizer=tokenizer(), train_dataset=rows(), dataset_text_field="text", max_seq_length=64,
        dataset_num_proc=1,
        args=settings(
            UnslothTrainingArguments, folder, embedding_learning_rate=1e-3, warmup_ratio=0.1, weight_decay=0.0
        ),
    )  # fmt: skip


PAIRS = [{"prompt": f"add {i} and 3: ", "chosen": f"{i + 3}", "rejected": f"{i} no"} for i in range(24)]


def preferences(model: Any, folder: Path) -> Any:
    PatchDPOTrainer()
    return trl.DPOTrainer(
        model=model, ref_model=None, args=settings(trl.DPOConfig, folder, warmup_ratio=0.1), beta=0.1,
        train_dataset=Dataset.from_list(PAIRS), tokenizer=tokenizer(), max_length=64, max_prompt_length=6,
    )  # fmt: skip


def odds(model: Any, folder: Path) -> Any:
    PatchDPOTrainer()
    return trl.ORPOTrainer(
        model=model, train_dataset=Dataset.from_list(PAIRS), tokenizer=tokenizer(),
        args=settings(
            trl.ORPOConfig, folder, max_length=64, max_prompt_length=32, max_completion_length=32, beta=0.1
        ),
    )  # fmt: skip


def groups(model: Any, folder: Path) -> Any:
    def digits(completions: list[Any], **others: Any) -> list[float]:
        return [sum(each.isdigit() for each in text) / 4 for text in completions]

    params = SamplingParams(min_p=0.1, top_p=1.0, top_k=-1, seed=3407, stop=[])
    config = settings(
        trl.GRPOConfig, folder, per_device_train_batch_size=1, gradient_accumulation_steps=1, num_generations=4,
        max_prompt_length=5, max_completion_length=6, temperature=1.0, vllm_sampling_params=params, warmup_ratio=0.1,
        use_vllm=hasattr(model, "is_front_of_lowrank"),
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": f"please add {i} and 3: "} for i in range(8)])
    return trl.GRPOTrainer(
        model=model, processing_class=tokenizer(), reward_funcs=[digits], args=config, train_dataset=data
    )


KINDS: dict[str, Callable[[Any, Path], Any]] = {
    each.__name__: each
    for each in (
        alpaca, conversations, parts_unsaid, other_keys, by_example, evaluated, packed, of_a_batch, preferences, odds,
        groups,
    )
}  # fmt: skip


def outcome(kind: Callable[[Any, Path], Any], model: Any, folder: Path) -> list[float]:
    set_seed(7)
    random.seed(7)
    trainer = kind(model, folder)
    trainer.train()
    found = losses(trainer)
    return found + [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_notebook_is_trl_with_peft(name: str, tmp_path: Path) -> None:
    ours = load(use_gradient_checkpointing="unsloth")
    ours.max_seq_length = None  # the twin has none
    twin = peft_twin(ours)
    before = {key: each.detach().clone() for key, each in ours.named_parameters() if each.requires_grad}
    found = [outcome(KINDS[name], model, tmp_path) for model in (ours, twin)]
    assert len(found[0]) >= 3
    assert found[0] == pytest.approx(found[1], abs=2e-4)
    own = dict(ours.named_parameters())
    assert any(not torch.equal(own[key], each) for key, each in before.items()), "it has learned"


def test_continued_pretraining_is_trl_with_peft(tmp_path: Path) -> None:
    ours = load(target_modules=["q_proj", "embed_tokens", "lm_head"])
    ours.max_seq_length = None
    found = [outcome(continued, model, tmp_path) for model in (ours, twin_with_copies(ours))]
    assert found[0] == pytest.approx(found[1], abs=2e-4)


def test_all_weights_are_trls(tmp_path: Path) -> None:
    ours, _ = FastLanguageModel.from_pretrained(
        TINY, None, torch.float32, load_in_4bit=False, full_finetuning=True, device_map={"": "cpu"}
    )
    theirs = AutoModelForCausalLM.from_pretrained(locate(TINY), dtype=torch.float32)
    found = [outcome(alpaca, model, tmp_path) for model in (ours, theirs)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)

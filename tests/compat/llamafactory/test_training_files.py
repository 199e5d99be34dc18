"""LLaMA-Factory training files, as its users have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lowrank.compat import load_any
from lowrank.compat.llamafactory.convert import is_llamafactory
from tests.compat.llamafactory.files import MINIMAL, WITHOUT_CODE, problems, read, settings

LLAMA3_LORA_SFT = """
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
# eval_dataset: alpaca_en_demo
# val_size: 0.1
# per_device_eval_batch_size: 1
# eval_strategy: steps
# eval_steps: 500
"""

LLAMA3_LORA_PRETRAIN = """
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true

### method
stage: pt
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: c4_demo
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16

### output
output_dir: saves/llama3-8b/lora/pretrain
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""

QWEN_FULL_SFT = """
### model
model_name_or_path: Qwen/Qwen2.5-7B-Instruct
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: full
deepspeed: examples/deepspeed/ds_z3_config.json

### dataset
dataset: identity,alpaca_en_demo
template: qwen
cutoff_len: 2048
preprocessing_num_workers: 16

### output
output_dir: saves/qwen2_5-7b/full/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
learning_rate: 1.0e-5
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000

### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""


def test_llama3_lora_sft(workplace: Path) -> None:
    config, _ = read(workplace, LLAMA3_LORA_SFT)
    found = settings(config)
    sources = [(source["path"], source["format"]) for source in found["data"]["train"]]
    assert sources == [("data/identity.json", "alpaca"), ("data/alpaca_en_demo.json", "alpaca")]
    assert found["model"]["path"] == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert (found["model"]["dtype"], found["model"]["activation_checkpointing"]) == ("bfloat16", "full")
    assert found["model"]["trust_remote_code"] is True
    adapter = found["adapter"]
    assert (adapter["type"], adapter["rank"], adapter["alpha"], adapter["dropout"]) == ("lora", 8, None, 0.0)
    assert adapter["target_modules"] == "all-linear"
    data = found["data"]
    assert (data["batch_size"], data["batch_tokens"], data["max_length"]) == (8, None, 2048)
    assert data["max_samples"] == 1000
    assert found["objective"]["type"] == "sft"
    assert (found["optimizer"]["learning_rate"], found["optimizer"]["weight_decay"]) == (1e-4, 0.0)
    assert (found["schedule"]["type"], found["schedule"]["warmup_ratio"]) == ("cosine", 0.1)
    assert (found["num_train_epochs"], found["max_steps"], found["seed"]) == (3.0, None, 42)
    assert (found["output_dir"], found["overwrite"], found["resume"]) == ("saves/llama3-8b/lora/sft", True, False)
    assert (found["save_steps"], found["logging_steps"], found["save_total_limit"]) == (500, 10, None)
    assert (found["tuning"], found["report_to"]) == ("adapter", [])


def test_llama3_lora_pretrain(workplace: Path) -> None:
    config, warnings = read(workplace, LLAMA3_LORA_PRETRAIN)
    found = settings(config)
    (source,) = found["data"]["train"]
    assert (source["path"], source["format"], source["columns"]) == ("data/c4_demo.jsonl", "text", {"text": "text"})
    assert found["objective"]["type"] == "pretrain"
    assert found["data"]["batch_tokens"] == 1 * 8 * 2048  # packing is on by default for stage pt
    assert found["data"]["on_too_long"] == "split"
    assert warnings == [WITHOUT_CODE]


def test_qwen_full_sft(workplace: Path) -> None:
    config, warnings = read(workplace, QWEN_FULL_SFT)
    found = settings(config)
    assert found["tuning"] == "full"
    assert (found["data"]["batch_size"], found["data"]["validation_split"]) == (2, 0.1)
    assert found["eval_steps"] == 500
    assert found["optimizer"]["learning_rate"] == 1e-5
    assert found["data"]["chat_template"] == "qwen"
    deepspeed, without_code = warnings
    assert without_code == WITHOUT_CODE
    assert deepspeed.startswith("deepspeed: examples/deepspeed/ds_z3_config.json cannot be read here")
    assert "every device holds the whole base" in deepspeed


def test_what_is_left_out_has_their_default_not_ours(workplace: Path) -> None:
    found = settings(read(workplace, MINIMAL)[0])
    assert found["optimizer"]["learning_rate"] == 5e-5
    assert found["schedule"]["type"] == "linear"
    assert found["adapter"]["rank"] == 8
    assert found["data"]["batch_size"] == 8
    assert (found["logging_steps"], found["save_steps"]) == (500, 500)
    assert found["model"]["dtype"] == "auto"
    assert found["resume"] is True  # theirs goes on with what is in output_dir


@pytest.mark.parametrize("cwd", ["elsewhere", "examples/train_lora"])
def test_dataset_dir_is_found_from_the_file_too(workplace: Path, monkeypatch: pytest.MonkeyPatch, cwd: str) -> None:
    (workplace / cwd).mkdir(exist_ok=True)
    monkeypatch.chdir(workplace / cwd)
    (source,) = read(workplace, MINIMAL)[0].data.train
    assert Path(source.path).resolve() == workplace / "data" / "identity.json"


def test_a_missing_dataset_info_says_where_it_was_looked_for(workplace: Path) -> None:
    (problem,) = problems(workplace, MINIMAL + "dataset_dir: nowhere\n")
    assert problem.startswith("dataset_dir: there is no dataset_info.json; looked for it in ")
    assert str(workplace / "nowhere") in problem
    assert str(workplace / "examples" / "train_lora" / "nowhere") in problem


def test_a_file_in_json(workplace: Path) -> None:
    path = workplace / "run.json"
    path.write_text(json.dumps(yaml.safe_load(LLAMA3_LORA_SFT)))
    assert load_any(path)[0] == read(workplace, LLAMA3_LORA_SFT)[0]


def test_whose_file_it_is() -> None:
    assert is_llamafactory({"model_name_or_path": "m", "output_dir": "x"})
    assert is_llamafactory({"stage": "sft"})
    assert not is_llamafactory({"model": "m", "output_dir": "x"})
    assert not is_llamafactory({"model": "m", "stage": "sft"})
    assert not is_llamafactory({})


def test_the_native_form_reads_back_equal(workplace: Path) -> None:
    for text in (LLAMA3_LORA_SFT, LLAMA3_LORA_PRETRAIN, QWEN_FULL_SFT):
        config, _ = read(workplace, text)
        path = workplace / "native.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        assert load_any(path)[0] == config


def test_overrides_in_their_words_and_in_ours(workplace: Path) -> None:
    config, _ = read(
        workplace, MINIMAL, "lora_rank=4", "adapter.alpha=3", "micro_batch_tokens=64", "learning_rate=1e-3"
    )
    assert (config.adapter.rank, config.adapter.alpha, config.micro_batch_tokens) == (4, 3, 64)
    assert config.optimizer.learning_rate == 1e-3


def test_overwrite_as_a_native_word_wins_over_their_automatic_resume(workplace: Path) -> None:
    config, _ = read(workplace, MINIMAL, "overwrite=true")
    assert (config.overwrite, config.resume) == (True, False)


def test_all_problems_at_once(workplace: Path) -> None:
    arguments = [
        "lora_rank=x",
        "fp8=true",
        "lora_rnk=1",
        "dataset=identty,pairs",
        "optim=rmsprop",
        "do_train=false",
    ]
    found = problems(workplace, MINIMAL, *arguments)
    assert [problem.split(":")[0] for problem in found] == [
        "fp8",
        "lora_rnk",
        "lora_rank",
        "do_train",
        "dataset 'identty'",
        "dataset 'pairs'",
        "optim",
    ]

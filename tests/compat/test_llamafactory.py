"""LLaMA-Factory training files, as its users have them."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import get_scheduler

from lowrank.compat import load_any
from lowrank.compat.llamafactory import Keys, is_llamafactory
from lowrank.compat.llamafactory_method import SCHEDULES
from lowrank.compat.llamafactory_others import known
from lowrank.config import RunConfig
from lowrank.data.chat.rendering import Renderer
from lowrank.data.prepare import examine
from lowrank.errors import ConfigError
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load_tokenizer
from lowrank.records import Preference, Rated

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

INFO: dict[str, Any] = {
    "identity": {"file_name": "identity.json"},
    "alpaca_en_demo": {"file_name": "alpaca_en_demo.json"},
    "c4_demo": {"file_name": "c4_demo.jsonl", "columns": {"prompt": "text"}},
    "pairs": {"file_name": "identity.json", "ranking": True},
    "chats": {
        "file_name": "identity.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "rated": {
        "file_name": "identity.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "label"},
    },
    "pictures": {"file_name": "identity.json", "formatting": "sharegpt", "columns": {"messages": "m", "images": "i"}},
    "films": {"file_name": "identity.json", "formatting": "sharegpt", "columns": {"messages": "m", "videos": "v"}},
}


WITHOUT_CODE = "model.trust_remote_code has no effect without --allow-code: the model's own code stays off"
"""Their examples all set it; a file is no permission."""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as LLaMA-Factory's repository, which is the current directory."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    for name in ("identity.json", "alpaca_en_demo.json", "c4_demo.jsonl"):
        (tmp_path / "data" / name).write_text("[]")
    (tmp_path / "examples" / "train_lora").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(workplace: Path, text: str, *arguments: str) -> tuple[RunConfig, list[str]]:
    path = workplace / "examples" / "train_lora" / "run.yaml"
    path.write_text(text)
    return load_any(path, arguments)


def problems(workplace: Path, text: str, *arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(workplace, text, *arguments)
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]


def settings(config: RunConfig) -> dict[str, Any]:
    content = config.model_dump(mode="json", exclude={"jobs"})
    assert [job.model_dump(mode="json", exclude={"name"}) for job in config.jobs] == [
        {key: content[key] for key in type(config.jobs[0]).model_fields if key != "name"}
    ]
    return content


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


MINIMAL = "model_name_or_path: m/x\ndo_train: true\ndataset: identity\noutput_dir: out\n"


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


@pytest.mark.parametrize(
    ("lines", "path", "value"),
    [
        ("lora_alpha: 32\n", "adapter.alpha", 32.0),
        ("lora_alpha: 0\n", "adapter.alpha", None),
        ("lora_dropout: 0.05\n", "adapter.dropout", 0.05),
        ("lora_target: q_proj, v_proj\n", "adapter.target_modules", ["q_proj", "v_proj"]),
        ("lora_target: [q_proj, v_proj]\n", "adapter.target_modules", ["q_proj", "v_proj"]),
        ("use_rslora: true\n", "adapter.type", "rslora"),
        ("additional_target: embed_tokens,lm_head\n", "adapter.modules_to_save", ["embed_tokens", "lm_head"]),
        ("add_special_tokens: <a>,<b>\nadd_tokens: c\n", "adapter.trainable_token_indices", ["c", "<a>", "<b>"]),
        ("add_tokens: c\nadditional_target: embed_tokens,lm_head\n", "adapter.trainable_token_indices", []),
        ("adapter_name_or_path: ./old\n", "adapter.path", "./old"),
        ("pure_bf16: true\n", "model.dtype", "bfloat16"),
        ("fp16: true\n", "model.dtype", "float16"),
        ("disable_gradient_checkpointing: true\n", "model.activation_checkpointing", "none"),
        ("use_cpu: true\n", "model.device", "cpu"),
        ("model_revision: v2\n", "model.revision", "v2"),
        ("neat_packing: true\n", "data.batch_tokens", 8 * 2048),
        ("packing: true\ncutoff_len: 100\ngradient_accumulation_steps: 2\n", "data.batch_tokens", 8 * 2 * 100),
        ("train_on_prompt: true\n", "data.train_on_prompt", True),
        ("mask_history: true\n", "data.mask_history", True),
        ("template: llama3\n", "data.chat_template", "llama3"),
        ("template: deepseek3\n", "data.chat_template", "deepseek"),
        ("default_system: You are kind.\n", "data.default_system", "You are kind."),
        ("enable_thinking: false\n", "data.chat_template_kwargs", {"enable_thinking": False}),
        ("disable_shuffling: true\n", "data.shuffle", False),
        ("streaming: true\nmax_steps: 7\n", "data.streaming", True),
        ("max_steps: 7\n", "max_steps", 7),
        ("adam_beta2: 0.95\n", "optimizer.betas", [0.9, 0.95]),
        ("max_grad_norm: 0\n", "optimizer.max_grad_norm", None),
        ("optim: sgd\n", "optimizer.type", "sgd"),
        ("optim: adamw_torch_fused\n", "optimizer.type", "adamw"),
        ("warmup_steps: 20\n", "schedule.warmup_steps", 20),
        ("warmup_steps: 0.05\n", "schedule.warmup_ratio", 0.05),
        ("neftune_noise_alpha: 5\n", "neftune_noise_alpha", 5.0),
        ("seed: 7\n", "seed", 7),
        ("save_strategy: epoch\nnum_train_epochs: 4\n", "save_steps", 0.25),
        ("save_strategy: no\n", "save_steps", None),
        ("save_steps: 0.2\n", "save_steps", 0.2),
        ("logging_steps: 5.0\n", "logging_steps", 5),
        ("eval_dataset: alpaca_en_demo\n", "eval_steps", None),
        ("eval_dataset: alpaca_en_demo\neval_strategy: steps\nlogging_steps: 25\n", "eval_steps", 25),
        ("val_size: 0.1\nevaluation_strategy: epoch\nnum_train_epochs: 2\n", "eval_steps", 0.5),
        ("val_size: 0.1\neval_strategy: steps\nearly_stopping_steps: 3\n", "early_stopping_patience", 3),
        ("report_to: [wandb, tensorboard]\n", "report_to", ["wandb", "tensorboard"]),
        ("use_swanlab: true\n", "report_to", ["swanlab"]),
        ("resume_from_checkpoint: true\noverwrite_output_dir: true\n", "resume", True),
        ("resume_from_checkpoint: false\n", "resume", False),
        ("per_device_train_batch_size: 1\ncutoff_len: 512\n", "micro_batch_tokens", 512),
        ("finetuning_type: full\n", "tuning", "full"),
        ("finetuning_type: freeze\nfreeze_trainable_layers: -1\n", "freeze.trainable_layers", -1),
        ("finetuning_type: freeze\nfreeze_trainable_modules: mlp,self_attn\n", "tuning", "freeze"),
        ("finetuning_type: oft\n", "adapter.type", "oft"),
        ("use_dora: true\n", "adapter.type", "dora"),
        ("pissa_init: true\npissa_iter: -1\n", "adapter.niter", 0),
        ("loraplus_lr_ratio: 16.0\n", "adapter.loraplus_lr_ratio", 16.0),
        ("quantization_bit: 4\n", "model.storage.type", "nf4"),
        ("quantization_bit: 4\ndouble_quantization: false\n", "model.storage.double_quant", False),
        ("quantization_bit: 3\nquantization_method: hqq\n", "model.storage.bits", 3),
        ("quantization_bit: 8\nquantization_method: eetq\n", "model.storage.type", "eetq"),
        ("quantization_bit: 8\n", "model.storage.type", "int8"),
        ("optim: paged_adamw_8bit\n", "optimizer.type", "paged_adamw_8bit"),
        ("optim: adafactor\n", "optimizer.type", "adafactor"),
        ("finetuning_type: full\nuse_galore: true\ngalore_rank: 128\n", "optimizer.rank", 128),
        ("finetuning_type: full\nuse_apollo: true\napollo_scale: 4.0\n", "optimizer.scale", 4.0),
        ("finetuning_type: full\nuse_muon: true\n", "optimizer.type", "muon"),
        ("finetuning_type: full\nmixture_of_depths: convert\n", "model.layer_wrapper.every", 2),
        ("finetuning_type: full\nmixture_of_depths: load\n", "model.layer_wrapper", None),
        ("finetuning_type: full\nuse_galore: true\ngalore_layerwise: true\n", "optimizer.layerwise", True),
        ("finetuning_type: full\nuse_apollo: true\napollo_layerwise: true\n", "optimizer.max_grad_norm", None),
    ],
)
def test_a_key_becomes(workplace: Path, lines: str, path: str, value: object) -> None:
    (workplace / "old").mkdir()
    found: Any = settings(read(workplace, MINIMAL + lines)[0])
    for key in path.split("."):
        found = found[key]
    assert found == value


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("lora_rnk: 8\n", "lora_rnk: unknown key; did you mean 'lora_rank'?"),
        ("lora_rank: big\n", "lora_rank: expected a whole number, got 'big'"),
        ("stage: ppo\n", "reward_model: required for stage: ppo"),
        ("stage: ppo\nreward_model: a\nreward_model_type: api\n", "reward_model_type: 'api' is not supported"),
        ("stage: ppo\nreward_model: a\nppo_target: 3.0\n", "ppo_target: 3.0 is not supported: the weight of the KL"),
        ("ppo_buffer_size: 2\n", "ppo_buffer_size: 2 is not supported: every optimizer step"),
        ("stage: sftt\n", "stage: 'sftt' is not trained; choose one of sft, pt, dpo, kto, rm, ppo; did you mean"),
        ("stage: dpo\n", "dataset 'identity': stage dpo needs preference pairs, and it is not marked ranking: true"),
        ("stage: kto\n", "dataset 'identity': stage kto needs rated answers, and columns.kto_tag is not given"),
        ("dataset: chats\nstage: dpo\npref_loss: kto_pair\n", "pref_loss: 'kto_pair' is not supported; use stage: kto"),
        (
            "dataset: chats\nstage: dpo\npref_loss: ipo\ndpo_label_smoothing: 0.1\n",
            "dpo_label_smoothing: only for pref_loss: sigmoid",
        ),
        (
            "dataset: chats\nstage: dpo\npref_loss: orpo\nref_model: other\n",
            "ref_model: stage dpo compares with no other model",
        ),
        ("finetuning_type: bone\n", "finetuning_type: 'bone' is not there; choose lora, oft, freeze, full"),
        ("use_dora: true\npissa_init: true\n", "use_dora and pissa_init: set only one"),
        ("quantization_bit: 5\n", "quantization_bit: bnb has 4, 8 bits, not 5"),
        ("quantization_bit: 8\nquantization_method: quanto\n", "quantization_method: 'quanto' is not there"),
        ("quantization_bit: 4\nquantization_method: eetq\n", "quantization_bit: eetq has 8 bits, not 4"),
        ("rope_scaling: yarn\n", "rope_scaling: how far "),
        ("badam_mode: ratio\n", "badam_mode: 'ratio' is not supported: only `layer` is there"),
        ("use_galore: true\noptim: adafactor\n", "optim: adafactor inside of use_galore is not there"),
        ("optim: rmsprop\n", "optim: 'rmsprop' is not supported"),
        ("lr_scheduler_type: reduce_lr_on_plateau\n", "lr_scheduler_type: 'reduce_lr_on_plateau' is not supported"),
        ("use_dft_loss: true\nuse_eaft_loss: true\n", "use_dft_loss and use_eaft_loss: set only one"),
        ("label_smoothing_factor: 0.1\nuse_dft_loss: true\n", "use_dft_loss and label_smoothing_factor: set only one"),
        ("ld_alpha: 0.5\n", "ld_alpha: only for stage: dpo with a reference"),
        ("train_from_scratch: true\n", "train_from_scratch: random weights are nothing to put an adapter on"),
        ("create_new_adapter: true\nadapter_name_or_path: a\n", "create_new_adapter: the given adapter is merged"),
        ("lr_scheduler_kwargs: {power: 2}\n", "lr_scheduler_kwargs: 'power' is not supported with linear"),
        ("report_to: neptune\n", "report_to: 'neptune' is not supported; choose from"),
        ("resume_from_checkpoint: out/checkpoint-5\n", "resume_from_checkpoint: 'out/checkpoint-5' may be another"),
        ("val_size: 1.5\n", "val_size: expected a share below 1, or a whole number of rows, got 1.5"),
        ("val_size: 0.1\neval_dataset: identity\n", "val_size and eval_dataset: set only one"),
        ("eval_strategy: steps\n", "eval_strategy: 'steps' needs held-out rows"),
        ("save_strategy: epoch\nmax_steps: 5\n", "save_strategy: 'epoch' is not supported together with max_steps"),
        ("logging_steps: 2.5\n", "logging_steps: expected a whole number, or a share below 1, got 2.5"),
        ("adapter_name_or_path: a,b\n", "adapter_name_or_path: training goes on with one adapter"),
        ("finetuning_type: full\nuse_rslora: true\n", "use_rslora: only for finetuning_type: lora"),
        ("mix_strategy: interleave\n", "mix_strategy: 'interleave' is not known; use concat, interleave_under"),
        ("mix_strategy: interleave_under\ninterleave_probs: 0.1,0.9\n", "interleave_probs: 2 numbers for 1 datasets"),
        ("interleave_probs: 0.5\n", "interleave_probs: only for mix_strategy"),
        ("dataset_dir: REMOTE:/a/b/c\n", "dataset_dir: /a/b/c cannot be downloaded from the hub"),
        ("bf16: true\nfp16: true\n", "bf16 and fp16: set only one"),
        ("metric_for_best_model: accuracy\n", "metric_for_best_model: 'accuracy' is not supported; choose loss"),
        (
            "metric_for_best_model: eval_rouge-l\n",
            "metric_for_best_model: 'eval_rouge-l' is of generated answers; set predict_with",
        ),
        ("stage: pt\n", "dataset 'identity': for stage pt, name the one column of text"),
        ("predict_with_generate: true\n", "predict_with_generate: training generates only for"),
        ("template: xverse\n", "template: 'xverse' is none of LLaMA-Factory's"),
        ("model: m\n", None),
        ("micro_batch_tokens: 64\n", "micro_batch_tokens: unknown key (a native key; give it on the command line)"),
    ],
)
def test_what_cannot_be_honored_is_an_error_that_names_it(workplace: Path, lines: str, problem: str | None) -> None:
    text = "".join(line + "\n" for line in MINIMAL.splitlines() if line.split(":")[0] != lines.split(":")[0]) + lines
    found = problems(workplace, text)
    if problem is None:  # a file with both kinds of keys is a native one, whose unknown keys are told
        assert (
            re.search(r"model_name_or_path: unknown key; (\d+ are known|did you mean)", "\n".join(found))
            or len(found) > 1
        )
    else:
        assert len(found) == 1
        assert found[0].startswith(problem)


def test_keys_of_pictures(workplace: Path) -> None:
    (workplace / "photos").mkdir()
    text = "model_name_or_path: lowrank/tiny\nstage: sft\ndo_train: true\nfinetuning_type: lora\ndataset: pictures\n"
    text += (
        "template: qwen2_vl\noutput_dir: out\nimage_max_pixels: 262144\nfreeze_vision_tower: false\nmedia_dir: photos\n"
    )
    config, _ = read(workplace, text)
    (job,) = config.jobs
    assert (config.model.image_max_pixels, config.model.image_min_pixels) == (262144, 32 * 32)
    assert job.adapter.parts == {"language_model", "vision_tower", "sound"}
    assert Path(str(job.data.train[0].media_dir)) == Path("photos")
    assert config.model.image_max_pixels == 262144
    (problem,) = problems(workplace, text, "image_do_pan_and_scan=true")
    assert "image_do_pan_and_scan: True is not supported" in problem
    (problem,) = problems(workplace, text, "finetuning_type=full")
    assert "freeze_vision_tower: with finetuning_type: full the language model alone is trained" in problem
    (problem,) = problems(workplace, text, "media_dir=nowhere")
    assert problem == "media_dir: there is no folder nowhere"


@pytest.mark.parametrize("dataset", ["identty", "pairs"])
def test_datasets_that_cannot_be_used(workplace: Path, dataset: str) -> None:
    (problem,) = problems(workplace, MINIMAL, f"dataset={dataset}")
    assert problem.startswith(f"dataset '{dataset}': ")


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


@pytest.mark.parametrize(
    ("lines", "warning"),
    [
        ("packing: true\n", "packing: packed documents never see each other here"),
        ("lr_scheduler_type: constant\nwarmup_ratio: 0.1\n", "warmup has no effect with lr_scheduler_type: constant"),
        ("warmup_ratio: 0.1\nwarmup_steps: 5\n", "warmup_ratio has no effect, since warmup_steps is set"),
        ("val_size: 0.1\neval_steps: 5\n", "eval_steps has no effect while eval_strategy is 'no'"),
        ("template: yi\n", "template: m/x is not on this machine yet, so 'yi' was not compared"),
        ("compute_accuracy: true\n", "compute_accuracy has no effect: held-out loss is what is measured"),
        ("hf_hub_token: hf_abc\n", "hf_hub_token has no effect: log in with"),
        ("dataloader_drop_last: true\n", "dataloader_drop_last has no effect"),
        ("use_swanlab: true\nswanlab_project: mine\n", "swanlab_project has no effect: the project at SwanLab is"),
        ("swanlab_run_name: first\n", "swanlab_run_name has no effect: the experiment is called after output_dir"),
        ("num_train_epochs: 2\nmax_steps: 4\n", None),
        ("flash_attn: fa2\nenable_liger_kernel: true\nplot_loss: true\noverwrite_cache: true\n", None),
        ("compute_accuracy: false\ncache_dir: null\npref_beta: 0.3\ntemperature: 0.1\n", None),
    ],
)
def test_warnings(workplace: Path, lines: str, warning: str | None) -> None:
    _, warnings = read(workplace, MINIMAL + lines)
    if warning is None:
        assert warnings == []
    else:
        assert len(warnings) == 1
        assert warnings[0].startswith(warning)
        assert "hf_abc" not in warnings[0]


def test_overrides_in_their_words_and_in_ours(workplace: Path) -> None:
    config, _ = read(
        workplace, MINIMAL, "lora_rank=4", "adapter.alpha=3", "micro_batch_tokens=64", "learning_rate=1e-3"
    )
    assert (config.adapter.rank, config.adapter.alpha, config.micro_batch_tokens) == (4, 3, 64)
    assert config.optimizer.learning_rate == 1e-3


def test_overwrite_as_a_native_word_wins_over_their_automatic_resume(workplace: Path) -> None:
    config, _ = read(workplace, MINIMAL, "overwrite=true")
    assert (config.overwrite, config.resume) == (True, False)


def test_interleaving(workplace: Path) -> None:
    text = MINIMAL.replace("identity", "identity,alpaca_en_demo")
    config, _ = read(workplace, text + "mix_strategy: interleave_under\ninterleave_probs: 0.25,0.75\n")
    assert config.data.mix == "interleave"
    assert [source.weight for source in config.data.train] == [0.25, 0.75]


def test_online_datasets_are_hub_names(workplace: Path) -> None:
    config, _ = read(workplace, MINIMAL + "dataset_dir: ONLINE\n", "dataset=a/b,c/d")
    assert [source.path for source in config.data.train] == ["a/b", "c/d"]


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


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("warmup", ["", "warmup_steps: 7\n", "warmup_ratio: 0.1\n"])
def test_learning_rates_are_those_of_transformers(workplace: Path, name: str, warmup: str) -> None:
    some: dict[str, dict[str, Any]] = {
        "cosine_with_min_lr": {"min_lr": 1e-5},
        "cosine_with_restarts": {"num_cycles": 3},
        "polynomial": {"power": 2.0, "lr_end": 2e-6},
        "warmup_stable_decay": {"num_stable_steps": 9, "num_decay_steps": 30, "min_lr_ratio": 0.1},
    }
    kwargs = some.get(name, {})
    text = MINIMAL + f"lr_scheduler_type: {name}\nmax_steps: 57\n{warmup}"
    text += f"lr_scheduler_kwargs: {json.dumps(kwargs)}\n" if kwargs else ""
    config, _ = read(workplace, text)
    warmup_steps = {"": 0, "warmup_steps: 7\n": 7, "warmup_ratio: 0.1\n": 6}[warmup]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that both numbers of wsd are there
        theirs = get_scheduler(name, optimizer, warmup_steps, 57, scheduler_specific_kwargs=kwargs)
    for step in range(57):
        ours = config.optimizer.learning_rate * config.schedule.factor(step, 57)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15), step
        optimizer.step()
        theirs.step()


def test_a_stable_phase_of_a_third(workplace: Path) -> None:
    """LLaMA-Factory's own number where the file gives none: a third of what comes after the warmup."""
    config, _ = read(workplace, MINIMAL + "lr_scheduler_type: warmup_stable_decay\nwarmup_steps: 6\n")
    factors = [config.schedule.factor(step, 36) for step in range(36)]
    assert factors[6:16] == [1.0] * 10
    assert factors[16] == 1.0 > factors[17]
    assert factors[35] == pytest.approx(0.5 * (1 + math.cos(math.pi * 19 / 20)))


@pytest.mark.parametrize(
    ("lines", "objective"),
    [
        ("use_dft_loss: true\n", {"type": "sft", "loss_type": "dft"}),
        ("use_asft_loss: true\nasft_alpha: 0.2\n", {"type": "sft", "loss_type": "asft", "asft_alpha": 0.2}),
        ("use_eaft_loss: true\neaft_alpha: 2\n", {"type": "sft", "loss_type": "eaft", "eaft_alpha": 2.0}),
        ("label_smoothing_factor: 0.1\n", {"type": "sft", "label_smoothing": 0.1}),
        (
            "stage: dpo\ndataset: chats\npref_bco_weight: 0.5\nld_alpha: 0.3\nref_model: m/y\n",
            {"type": "dpo", "bco_weight": 0.5, "ld_alpha": 0.3, "reference_model": "m/y"},
        ),
        ("stage: rm\ndataset: chats\n", {"type": "reward", "center_rewards_coefficient": 0.0}),
        (
            "stage: dpo\ndataset: chats\npref_loss: hinge\npref_beta: 0.3\npref_ftx: 0.5\n",
            {"type": "dpo", "loss_type": "hinge", "beta": 0.3, "pref_ftx": 0.5, "label_smoothing": 0.0},
        ),
        (
            "stage: dpo\ndataset: chats\ndpo_label_smoothing: 0.1\n",
            {"type": "dpo", "loss_type": "sigmoid", "beta": 0.1, "pref_ftx": 0.0, "label_smoothing": 0.1},
        ),
        ("stage: dpo\ndataset: chats\npref_loss: orpo\n", {"type": "orpo", "beta": 0.1}),
        (
            "stage: dpo\ndataset: pairs\npref_loss: simpo\npref_beta: 2.0\nsimpo_gamma: 1.2\n",
            {"type": "simpo", "beta": 2.0, "gamma": 1.2},
        ),
        (
            "stage: kto\ndataset: rated\nkto_chosen_weight: 1.5\nkto_rejected_weight: 0.5\n",
            {"type": "kto", "beta": 0.1, "pref_ftx": 0.0, "desirable_weight": 1.5, "undesirable_weight": 0.5},
        ),
    ],
)
def test_stages_on_answers(workplace: Path, lines: str, objective: dict[str, Any]) -> None:
    text = "".join(
        line + "\n"
        for line in MINIMAL.splitlines()
        if not any(line.startswith(key.split(":")[0] + ":") for key in lines.splitlines())
    )
    config, _ = read(workplace, text + lines)
    assert objective.items() <= config.objective.model_dump().items()


def test_stage_ppo(workplace: Path) -> None:
    text = MINIMAL + "stage: ppo\nreward_model: judge\nppo_epochs: 2\nppo_score_norm: true\nppo_whiten_rewards: true\n"
    config, _ = read(workplace, "\n".join(line for line in text.splitlines() if line != "stage: sft") + "\n")
    objective = config.objective.model_dump()
    assert (
        objective
        | {
            "type": "ppo",
            "max_completion_length": 1024,
            "temperature": 0.95,
            "top_p": 0.7,
            "top_k": 50,
            "num_ppo_epochs": 2,
            "score_norm": True,
            "whiten_rewards": True,
            "kl_coef": 0.2,
        }
        == objective
    )
    assert objective["reward_model"].endswith("judge")


def test_pref_ftx_that_is_not_heard_speaks(workplace: Path) -> None:
    text = MINIMAL.replace("dataset: identity", "dataset: chats")
    _, warnings = read(workplace, text + "stage: dpo\npref_loss: simpo\npref_ftx: 0.5\n")
    assert "pref_ftx has no effect with objective simpo" in warnings


@pytest.mark.parametrize(
    ("stage", "name", "record"),
    [("dpo", "dpo_en_demo", Preference), ("rm", "dpo_zh_demo", Preference), ("kto", "kto_en_demo", Rated)],
)
def test_their_preference_data(shared_data: Path, workplace: Path, stage: str, name: str, record: type) -> None:
    """Found through their dataset_info.json; the doctor loses no row."""
    text = MINIMAL.replace("dataset: identity", f"dataset: {name}")
    config, _ = read(workplace, text + f"stage: {stage}\ndataset_dir: {shared_data}\n")
    tokenizer = load_tokenizer(ModelConfig(path="lowrank/tiny"))
    data = config.data.model_copy(update={"max_length": 100_000, "chat_template": None})
    report = examine(data, renderer=Renderer(tokenizer, data), record=record)
    (dataset,) = report.datasets
    rows = len(json.loads((shared_data / f"{name}.json").read_text()))
    assert (dataset.read, dataset.used) == (rows, rows)


def test_their_whole_dataset_info(shared_data: Path, workplace: Path) -> None:
    info = json.loads((shared_data / "dataset_info.json").read_text())
    usable = [name for name, entry in info.items() if entry.get("file_name") and not entry.get("ranking")]
    usable = [name for name in usable if not name.startswith("mllm")]
    text = MINIMAL + f"dataset_dir: {shared_data}\n"
    files = [name for name in usable if (shared_data / info[name]["file_name"]).exists() and name != "c4_demo"]
    config, _ = read(workplace, text, f"dataset={','.join(files)}")
    assert [Path(source.path).name for source in config.data.train] == [info[name]["file_name"] for name in files]
    assert len(files) >= 5


def test_generated_answers_may_decide(workplace: Path) -> None:
    text = MINIMAL + "predict_with_generate: true\nmetric_for_best_model: eval_rouge-l\nval_size: 0.5\n"
    config, _ = read(workplace, text + "load_best_model_at_end: true\ngreater_is_better: true\nmax_new_tokens: 32\n")
    job = config.jobs[0]
    assert (job.eval_metric, job.eval_generate_samples, job.eval_max_new_tokens) == ("llamafactory_rougeL", None, 32)
    assert read(workplace, MINIMAL)[0].jobs[0].eval_metric == "loss"


def test_defaults_are_those_of_transformers() -> None:
    from transformers import Seq2SeqTrainingArguments

    theirs = {name: field.default for name, field in Seq2SeqTrainingArguments.__dataclass_fields__.items()}
    renamed = {"optim", "report_to", "output_dir", "num_train_epochs"}  # written differently, meaning the same
    for name, field in Keys.model_fields.items():
        if name in theirs and name not in renamed and not field.is_required():
            ours = field.get_default(call_default_factory=True)
            value = getattr(theirs[name], "value", theirs[name])
            assert (ours or None) == (value or None) or name == "metric_for_best_model", name


def test_every_key_of_transformers_is_known() -> None:
    import transformers
    from transformers import Seq2SeqTrainingArguments

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version > (5, 23):
        pytest.skip(f"the table was made for transformers 5.23, this is {transformers.__version__}")
    assert sorted(set(Seq2SeqTrainingArguments.__dataclass_fields__) - set(known())) == []


def test_every_key_has_one_fate() -> None:
    names = known()
    assert len(names) == len(set(names))
    assert len(names) > 350


def test_sounds_lie_where_their_files_say(workplace: Path) -> None:
    """`media_dir` as for pictures; the rate is the model's own."""
    info = {"file_name": "identity.json", "formatting": "sharegpt", "columns": {"messages": "m", "audios": "a"}}
    place = workplace / "data" / "dataset_info.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"mllm_audio_demo": info}))
    (workplace / "sounds").mkdir()
    text = MINIMAL.replace("identity", "mllm_audio_demo") + "media_dir: sounds\naudio_sampling_rate: 16000\n"
    (job,) = read(workplace, text)[0].jobs
    (source,) = job.data.train
    assert (source.columns["audios"], Path(str(source.media_dir))) == ("a", Path("sounds"))


def test_keys_of_videos(workplace: Path) -> None:
    text = MINIMAL.replace("identity", "films") + "video_max_pixels: 16384\nvideo_fps: 1.0\nvideo_maxlen: 64\n"
    config, _ = read(workplace, text)
    assert (config.model.video_max_pixels, config.model.video_min_pixels) == (16384, 16 * 16)
    assert (config.model.video_fps, config.model.video_maxlen) == (1.0, 64)
    (source,) = config.jobs[0].data.train
    assert (source.columns["videos"], source.media_dir) == ("v", "data")
    _, notices = read(workplace, text + "use_audio_in_video: true\n")
    assert any("use_audio_in_video" in each and "give it as a sound of its own" in each for each in notices)

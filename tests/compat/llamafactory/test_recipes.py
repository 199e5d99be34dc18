"""The families of LLaMA-Factory's `examples/` for text models, run with only their paths and the template changed.

Written from its documented keys; each takes two steps on the tiny base.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank.cli.expand import expand_model
from lowrank.compat import load_any
from lowrank.errors import ConfigError
from lowrank.models.config import ModelConfig
from lowrank.pipelines.train import train

COMMON = """
model_name_or_path: lowrank/tiny
trust_remote_code: true
do_train: true
template: default
cutoff_len: 128
max_samples: 8
preprocessing_num_workers: 16
dataloader_num_workers: 4
logging_steps: 1
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
learning_rate: 1.0e-4
num_train_epochs: 3.0
max_steps: 2
lr_scheduler_type: cosine
warmup_steps: 1
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
LORA = "finetuning_type: lora\nlora_rank: 8\nlora_target: all\n"
SFT = "stage: sft\ndataset: plain\n"
FULL = "finetuning_type: full\npure_bf16: true\n"
RECIPES = {
    "train_full/sft": SFT + "finetuning_type: full\n",
    "train_lora/sft": SFT + LORA,
    "train_lora/pretrain": "stage: pt\ndataset: notes\n" + LORA,
    "train_lora/dpo": "stage: dpo\ndataset: pairs\npref_beta: 0.1\npref_loss: sigmoid\n" + LORA,
    "train_lora/kto": "stage: kto\ndataset: rated\npref_beta: 0.1\n" + LORA,
    "train_lora/reward": "stage: rm\ndataset: pairs\n" + LORA,
    "train_qlora/bnb": SFT + LORA + "quantization_bit: 4\nquantization_method: bnb\ndouble_quantization: false\n",
    "train_qlora/otfq": SFT + LORA + "quantization_bit: 8\nquantization_method: bnb\n",
    "train_qlora/hqq": SFT + LORA + "quantization_bit: 4\nquantization_method: hqq\n",
    "extras/adam_8bit": SFT + FULL + "optim: adamw_8bit\n",
    "extras/galore": SFT
    + FULL
    + "use_galore: true\ngalore_target: mlp,self_attn\ngalore_rank: 128\ngalore_scale: 2.0\ngalore_layerwise: false\n",
    "extras/apollo": SFT
    + FULL
    + "use_apollo: true\napollo_target: all\napollo_rank: 128\napollo_scale: 32.0\napollo_layerwise: false\n",
    "extras/badam": SFT
    + FULL
    + "use_badam: true\nbadam_mode: layer\nbadam_switch_mode: ascending\nbadam_switch_interval: 50\nbadam_verbose: 2\n",
    "extras/adam_mini": SFT + FULL + "use_adam_mini: true\n",
    "extras/shift_attn": SFT + LORA + "shift_attn: true\n",
    "extras/mod": SFT + FULL + "mixture_of_depths: convert\n",
    "extras/galore_layerwise": SFT
    + FULL
    + "use_galore: true\ngalore_rank: 16\ngalore_layerwise: true\npure_bf16: true\n",
    "extras/galore_8bit": SFT + FULL + "use_galore: true\ngalore_rank: 16\noptim: adamw_8bit\n",
    "extras/oft/dpo": "stage: dpo\ndataset: pairs\nfinetuning_type: oft\noft_block_size: 32\n",
    "extras/oft/kto": "stage: kto\ndataset: rated\nfinetuning_type: oft\noft_block_size: 32\n",
    "extras/fsdp_qlora": SFT + "finetuning_type: lora\nlora_target: q_proj,v_proj\nquantization_bit: 4\n",
    "extras/dft": SFT + FULL + "use_dft_loss: true\n",
    "extras/asft": SFT + FULL + "use_asft_loss: true\nasft_alpha: 0.1\n",
    "extras/eaft": SFT + FULL + "use_eaft_loss: true\n",
    "extras/smoothed": SFT + LORA + "label_smoothing_factor: 0.1\n",
    "extras/scratch": SFT + FULL + "train_from_scratch: true\n",
    "extras/dpo_reference": "stage: dpo\ndataset: pairs\nref_model: lowrank/tiny\nld_alpha: 0.5\n"
    "pref_bco_weight: 0.5\n" + LORA,
    "extras/muon": SFT + "finetuning_type: full\nuse_muon: true\n",
    "extras/loraplus": SFT + LORA + "loraplus_lr_ratio: 16.0\n",
    "extras/pissa": SFT + LORA + "pissa_init: true\npissa_iter: 16\npissa_convert: true\n",
    "extras/dora": SFT + LORA + "use_dora: true\n",
    "extras/oft": SFT + "finetuning_type: oft\noft_block_size: 32\noft_target: all\n",
    "extras/freeze": SFT + "finetuning_type: freeze\nfreeze_trainable_layers: 2\n",
    "extras/llama_pro": SFT
    + "finetuning_type: freeze\nfreeze_trainable_layers: 2\nfreeze_trainable_modules: all\nuse_llama_pro: true\n",
}


def rows() -> dict[str, list[dict[str, Any]]]:
    requested = [{"instruction": f"Say {number}.", "input": "", "output": f"{number}!"} for number in range(8)]
    talk = [{"from": "human", "value": "Which is larger, 1 or 2?"}]
    better, worse = {"from": "gpt", "value": "2"}, {"from": "gpt", "value": "1"}
    described = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    return {
        "plain": requested,
        "notes": [{"text": f"Note {number}: the sea is wide and the night is long."} for number in range(8)],
        "pairs": [{"conversations": talk, "chosen": better, "rejected": worse}] * 8,
        "rated": [{"messages": described, "label": number % 2 == 0} for number in range(8)],
    }


INFO = {
    "plain": {"file_name": "plain.json"},
    "notes": {"file_name": "notes.json", "columns": {"prompt": "text"}},
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "rated": {
        "file_name": "rated.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "label"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
}


REFUSED = {
    "extras/fp8": (SFT + FULL + "fp8: true\n", "remove it and set bf16"),
}
"""Families that do not run here, and what their error points to."""
QUICK = ("train_full/sft", "train_lora/pretrain", "train_lora/kto", "train_qlora/bnb", "extras/llama_pro")
"""The others are slow only together."""


def test_ppo_with_a_reward_model_trained_here(tmp_path: Path) -> None:
    """train_lora/reward, then train_lora/ppo on its result."""
    write(tmp_path, "stage: rm\ndataset: pairs\n" + LORA, output_dir=str(tmp_path / "reward"))
    train(load_any(tmp_path / "recipe.yaml")[0])
    generation = "max_new_tokens: 8\ntop_k: 0\ntop_p: 0.9\n"
    write(
        tmp_path, "stage: ppo\ndataset: plain\n" + LORA + generation, reward_model=str(tmp_path / "reward/default/last")
    )
    (job,) = train(load_any(tmp_path / "recipe.yaml")[0])["jobs"].values()
    assert (job["steps"], job["skipped_steps"], job["finished"]) == (2, 0, "done")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_pointer(name: str, tmp_path: Path) -> None:
    recipe, pointer = REFUSED[name]
    write(tmp_path, recipe)
    with pytest.raises(ConfigError) as caught:
        load_any(tmp_path / "recipe.yaml")
    assert pointer in str(caught.value)


def write(folder: Path, recipe: str, **more: str) -> None:
    """The recipe and its data, with paths of this machine."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    (data / "dataset_info.json").write_text(json.dumps(INFO))
    for dataset, content in rows().items():
        (data / f"{dataset}.json").write_text(json.dumps(content))
    settings = yaml.safe_load(COMMON) | yaml.safe_load(recipe)
    settings |= {"dataset_dir": str(data), "output_dir": str(folder / "saves"), **more}
    if settings["stage"] == "pt":
        del settings["template"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_runs_as_it_is(name: str, tmp_path: Path) -> None:
    more = {}
    if "use_llama_pro" in RECIPES[name]:
        expand_model(ModelConfig(path="lowrank/tiny"), 2, tmp_path / "expanded")
        more["model_name_or_path"] = str(tmp_path / "expanded")
    write(tmp_path, RECIPES[name], **more)
    config, _ = load_any(tmp_path / "recipe.yaml")
    summary = train(config)
    (job,) = summary["jobs"].values()
    assert (job["steps"], job["skipped_steps"], job["finished"]) == (2, 0, "done")
    assert job["last_loss"] is not None
    assert job["optimizer_state_bytes"] > 0

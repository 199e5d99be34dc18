"""Every setting that changes the model, planned and trained one after the other: what a plan does to the process's
memory shows in the run after it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lowrank.config import validate_settings
from lowrank.pipelines.train import train
from lowrank.report.events import Event, Notice
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca
from tests.command_line import lowrank
from tests.tiny_models import FAMILIES

_COPY = "adapter.modules_to_save"
_SLOW = pytest.mark.slow
ALONE = {
    "head and embedding": [f"{_COPY}=[lm_head, embed_tokens]"],
    "norms beside a packed base": [f"{_COPY}=[norm, lm_head]", "model.storage=nf4"],
    "the other end of a tied pair": ["model=tied", f"{_COPY}=[lm_head]"],
    "a copied linear layer, recomputed": [f"{_COPY}=[down_proj]", "model.activation_checkpointing=full"],
    "norms, recomputed": [f"{_COPY}=[norm]", "model.activation_checkpointing=selective", "model.dtype=bfloat16"],
    "head and embedding as targets": ["adapter.target_modules=[q_proj, embed_tokens, lm_head]"],
    "tokens": ['adapter.trainable_token_indices=["<|im_end|>", 5]'],
    "tokens of a tied pair": ["model=tied", 'adapter.trainable_token_indices=["<|im_end|>", 5]'],
    "freeze": ["tuning=freeze", "freeze.trainable_layers=1", "freeze.extra_modules=[norm]"],
    "full": ["tuning=full"],
    "rope scaling": ["model.rope_scaling={type: yarn, factor: 2}", f"{_COPY}=[norm]"],
    "shifted attention": ["model.shift_attn=8", f"{_COPY}=[norm]"],
    "not lean, padded": ["model.memory_efficient_modules=false", "model.attention=padded", f"{_COPY}=[norm]"],
    "mixture of depths": ["model.layer_wrapper=mixture_of_depths", "tuning=full"],
    "experts": ["model=mixture", "adapter.target_parameters=[experts.down_proj]", f"{_COPY}=[norm]"],
    "noise and a copy": ["neftune_noise_alpha=5", f"{_COPY}=[embed_tokens]"],
}
"""Words of the command line, by what they change."""
IN_DEFAULT = {"head and embedding"}
TOGETHER: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "norms": {"modules_to_save": ["input_layernorm", "norm"]},
    "regular expression": {"target_modules": r".*\.(q|v)_proj", "exclude_modules": ["layers.0.self_attn.v_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 8}, "dropout": 0.1},
    **{
        name: {"type": name}
        for name in ("dora", "ia3", "loha", "lokr", "lora_fa", "miss", "oft", "olora", "pissa", "rslora", "vera", "eva")
    },
    "prompt_tuning": {"type": "prompt_tuning", "num_virtual_tokens": 3},
    "p_tuning": {"type": "p_tuning", "num_virtual_tokens": 3},
    "prefix_tuning": {"type": "prefix_tuning", "num_virtual_tokens": 3},
}
"""Adapters of jobs that share one base."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for name, tied in (("tied", True), ("untied", False)):
        save_checkpoint_folder(folder / name, tie_word_embeddings=tied, intermediate_size=64)
    write_alpaca(folder / "train.json", 8)
    common = {"data": {"train": "train.json", "batch_size": 4}, "max_steps": 2, "save_steps": None}
    (folder / "run.yaml").write_text(json.dumps({"model": "untied", "output_dir": "run", **common}))
    return folder


def mixture(folder: Path) -> None:
    """A mixture of experts with the same tokenizer."""
    save_checkpoint_folder(folder)
    config: Any = FAMILIES["qwen3_moe"]()
    config.vocab_size, config.dtype = 259, "float32"
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def check(folder: Path) -> None:
    summary: Mapping[str, Any] = json.loads((folder / "summary.json").read_text())
    assert all(math.isfinite(job["last_loss"]) for job in summary["jobs"].values())


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in IN_DEFAULT else _SLOW) for name in ALONE])
def test_as_processes(world: Path, name: str) -> None:
    arguments = ALONE[name]
    if "model=mixture" in arguments and not (world / "mixture").exists():
        mixture(world / "mixture")
    planned = lowrank("plan", "run.yaml", *arguments, "--json", cwd=world)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert json.loads(planned.stdout)["plan"]["peak"] > 0
    out = name.replace(" ", "-")
    ran = lowrank("train", "run.yaml", *arguments, f"output_dir={out}", "ignore_memory_plan=true", cwd=world)
    described = ran.stdout + ran.stderr
    assert ran.returncode == 0, described
    assert "could not be planned" not in described
    check(world / out)


def test_every_adapter_on_one_base(world: Path) -> None:
    received: list[Event] = []

    class Ear:
        def report(self, event: Event) -> None:
            received.append(event)

        def close(self) -> None:
            pass

    jobs = [
        {"name": name.replace(" ", "-"), "adapter": {"rank": 4, **adapter} if "rank" not in adapter else adapter}
        for name, adapter in TOGETHER.items()
    ]
    data = {"train": str(world / "train.json"), "batch_size": 4}
    given = {"model": str(world / "untied"), "data": data, "jobs": jobs, "max_steps": 2, "save_steps": None}
    train(validate_settings({**given, "output_dir": str(world / "all"), "ignore_memory_plan": True}), reporters=[Ear()])
    described = [event.text for event in received if isinstance(event, Notice)]
    assert not any("could not be planned" in text for text in described), described
    check(world / "all")


def test_additional_target_of_llamafactory(world: Path) -> None:
    (world / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "train.json"}}))
    lines = {
        "model_name_or_path": "untied", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 4,
        "lora_target": "all", "additional_target": "embed_tokens,lm_head", "dataset_dir": ".", "dataset": "rows",
        "template": "default", "cutoff_len": 64, "output_dir": "factory", "max_steps": 1,
        "per_device_train_batch_size": 2,
    }  # fmt: skip
    (world / "factory.yaml").write_text(json.dumps(lines))
    ran = lowrank("train", "factory.yaml", "ignore_memory_plan=true", cwd=world)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    check(world / "factory")

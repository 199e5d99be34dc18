"""Every argument of Unsloth's functions with the value it has there when nobody gives it (August 2026): it asks for
nothing, so it is taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

import lowrank.compat.unsloth as front
from lowrank.compat.unsloth import FastLanguageModel, FastModel, get_chat_template, to_sharegpt
from lowrank.compat.unsloth.responses import train_on_responses_only
from lowrank.errors import ConfigError
from lowrank.models.loading.pretrained import TINY
from tests.compat.test_unsloth import load, tokenizer
from tests.hub_stand_in import hub_stand_in

LOADER: dict[str, Any] = {
    "max_seq_length": 2048, "dtype": None, "load_in_4bit": True, "load_in_8bit": False, "load_in_16bit": False,
    "full_finetuning": False, "token": None, "device_map": "sequential", "rope_scaling": None, "fix_tokenizer": True,
    "trust_remote_code": False, "use_gradient_checkpointing": "unsloth", "resize_model_vocab": None, "revision": None,
    "use_exact_model_name": False, "offload_embedding": False, "float32_mixed_precision": None,
    "fast_inference": False, "gpu_memory_utilization": 0.5, "float8_kv_cache": False, "random_state": 3407,
    "max_lora_rank": 64, "disable_log_stats": True, "qat_scheme": None, "load_in_fp8": False,
    "unsloth_tiled_mlp": False, "text_only": False,
}  # fmt: skip
MORE_OF_FAST_MODEL: dict[str, Any] = {
    "return_logits": False, "fullgraph": True, "auto_model": None, "whisper_language": None, "whisper_task": None,
    "unsloth_force_compile": False, "target_parameters": None,
}  # fmt: skip
ADAPTER: dict[str, Any] = {
    "r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "layers_to_transform": None,
    "layers_pattern": None, "finetune_last_n_layers": None, "use_gradient_checkpointing": "unsloth",
    "random_state": 3407, "max_seq_length": 2048, "use_rslora": False, "modules_to_save": None,
    "init_lora_weights": True, "loftq_config": {}, "temporary_location": "_unsloth_temporary_saved_buffers",
    "qat_scheme": None, "target_parameters": None, "ensure_weight_tying": False,
}  # fmt: skip
MORE_OF_FAST_MODELS_ADAPTER: dict[str, Any] = {
    "target_modules": None, "finetune_vision_layers": True, "finetune_language_layers": True,
    "finetune_attention_modules": True, "finetune_mlp_modules": True, "task_type": "CAUSAL_LM",
    "finetune_audio_layers": False,
}  # fmt: skip
_SAVING: dict[str, Any] = {
    "push_to_hub": False, "token": None, "is_main_process": True, "state_dict": None, "save_function": torch.save,
    "max_shard_size": "5GB", "safe_serialization": True, "variant": None, "save_peft_format": True, "tags": None,
    "temporary_location": "_unsloth_temporary_saved_buffers", "maximum_memory_usage": 0.75,
}  # fmt: skip
_CALIBRATING = {"calibration_dataset": None, "num_calibration_samples": 512, "max_seq_length": 2048}
MERGED: dict[str, Any] = {**_SAVING, **_CALIBRATING, "datasets": None}
GGUF: dict[str, Any] = {
    **_SAVING, "first_conversion": None, "private": None, "save_method": None, "imatrix_file": None,
    "merge_is_disposable": True,
}  # fmt: skip
PUSHING: dict[str, Any] = {
    "use_temp_dir": None, "commit_message": "Trained with Unsloth", "private": None, "token": None,
    "max_shard_size": "5GB", "create_pr": False, "safe_serialization": True, "revision": None,
    "commit_description": "Upload model trained with Unsloth 2x faster", "tags": None,
    "temporary_location": "_unsloth_temporary_saved_buffers", "maximum_memory_usage": 0.75, "datasets": None,
}  # fmt: skip


def test_loading_and_adapting() -> None:
    model, _ = FastLanguageModel.from_pretrained(TINY, **LOADER)
    adapted = FastLanguageModel.get_peft_model(model, **ADAPTER)
    assert adapted.peft_config["default"].r == 16
    model, _ = FastModel.from_pretrained(TINY, **LOADER, **MORE_OF_FAST_MODEL)
    FastModel.get_peft_model(model, **ADAPTER, **MORE_OF_FAST_MODELS_ADAPTER)


def test_saving(tmp_path: Path) -> None:
    model, own = load(), tokenizer()
    model.save_pretrained_merged(tmp_path / "lora", own, "lora", **MERGED)
    assert (tmp_path / "lora/adapter_model.safetensors").is_file()
    with pytest.raises(ConfigError, match="save_method='merged_17bit'"):  # by place, and all others are taken
        model.save_pretrained_merged(tmp_path / "lora", own, "merged_17bit", **MERGED)
    with pytest.raises(ConfigError, match="quantization_method='q9'"):
        model.save_pretrained_gguf(tmp_path / "gguf", own, ["q8_0", "q9"], **GGUF)
    with pytest.raises(ConfigError, match=r"imatrix_file='x'; leave it out"):
        model.save_pretrained_gguf(tmp_path / "gguf", own, "q8_0", **{**GGUF, "imatrix_file": "x"})


def test_several_types_of_gguf_in_one_call(tmp_path: Path) -> None:
    load().save_pretrained_gguf(tmp_path / "it", tokenizer(), ["q8_0", "f16"], verify=False)
    assert {"it-Q8_0.gguf", "it-F16.gguf"} <= set(os.listdir(tmp_path / "it"))


def test_pushing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    model = load(target_modules=["q_proj"])
    with hub_stand_in() as (kind, address):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        model.push_to_hub_merged("me/it", tokenizer(), "lora", **{**PUSHING, "token": "hf_secret"})
        assert kind.messages["me/it"] == "Trained with Unsloth"
        model.push_to_hub("me/it", token="hf_secret", commit_message="the second")
        assert kind.messages["me/it"] == "the second"


def test_conversations() -> None:
    same = {each: each for each in ("role", "content", "user", "assistant")}
    own = get_chat_template(
        tokenizer(), chat_template="chatml", mapping=same, map_eos_token=True, system_message=None, patch_saving=True,
        use_zoo_tokenizer_patch=None,
    )  # fmt: skip
    labels_of = train_on_responses_only(
        None, instruction_part=None, response_part=None, force_match=True, tokenizer=own, return_function=True,
        num_proc=None, last_response_only=False,
    )  # fmt: skip
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    text = own.apply_chat_template([{"role": role, "content": content} for role, content in turns], tokenize=False)
    token_L = own(text, add_special_tokens=False)["input_ids"]
    (label_L,) = labels_of({"input_ids": [token_L]})["labels"]
    assert all(label in (-100, token) for label, token in zip(label_L, token_L, strict=True))
    learned = own.decode([label for label in label_L if label != -100])
    assert learned == "b<|im_end|>\nd<|im_end|>\n", "the answers with their ends, and nothing of the questions"
    from datasets import Dataset

    conversations = to_sharegpt(
        Dataset.from_list([{"instruction": "a", "output": "b"}]), merged_prompt="", merged_column_name="instruction",
        output_column_name="output", remove_unused_columns=True, conversation_extension=1, random_state=3407,
    )  # fmt: skip
    expected = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert conversations.to_list() == [{"conversations": expected}]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: FastLanguageModel.from_pretrained(TINY, local_files_only=True), "HF_HUB_OFFLINE"),
        (lambda: FastLanguageModel.from_pretrained(TINY, quantization_config={"a": 1}), "use load_in_4bit"),
        (lambda: load(finetune_last_n_layers=2), "regular expression"),
    ],
)
def test_what_they_ask_for_is_refused_with_a_way_out(call: Callable[[], Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        call()


THEIR_NAMES = (
    "FastLanguageModel", "FastModel", "FastTextModel", "FastVisionModel", "FastSentenceTransformer", "FastLlamaModel",
    "FastMistralModel", "FastQwen2Model", "FastQwen3Model", "FastQwen3MoeModel", "FastGraniteModel",
    "FastFalconH1Model", "PatchDPOTrainer", "PatchKTOTrainer", "PatchFastRL", "is_bfloat16_supported",
    "UnslothTrainer", "UnslothTrainingArguments", "unsloth_train", "UnslothVisionDataCollator", "QGaloreConfig",
    "RawTextDataLoader", "TextPreprocessor", "get_chat_template", "to_sharegpt", "standardize_sharegpt",
    "standardize_data_formats", "apply_chat_template", "train_on_responses_only", "check_python_modules",
    "create_locked_down_function", "execute_with_time_limit", "is_port_open", "launch_openenv",
)  # fmt: skip


@pytest.mark.parametrize("name", THEIR_NAMES)
def test_a_name_of_theirs_is_here_or_refused_in_words(name: str) -> None:
    problem = ""
    try:
        getattr(front, name)
    except ImportError as error:
        problem = str(error)
    assert not problem or problem.startswith(f"{name}: ")

"""Arguments of Unsloth's loader: what each asks for, and what is said where nothing here answers to it."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lowrank.errors import ConfigError, raise_all
from lowrank.setting_problems import settings_of

_LOG = logging.getLogger(__name__)
_logged: set[str] = set()
_OF_VLLM = "vLLM's; answers come from the model's own generate()"
WITHOUT_EFFECT: Mapping[str, str] = {
    "fast_inference": _OF_VLLM,
    "gpu_memory_utilization": _OF_VLLM,
    "max_lora_rank": _OF_VLLM,
    "float8_kv_cache": _OF_VLLM,
    "disable_log_stats": _OF_VLLM,
    "unsloth_vllm_standby": _OF_VLLM,
    "offload_embedding": "the embedding stays where the model is",
    "unsloth_force_compile": "nothing is compiled here",
    "fullgraph": "nothing is compiled here",
    "float32_mixed_precision": "adapters are trained in float32, the base computes in the dtype it was loaded in",
    "finetune_audio_layers": "only the language model is loaded",
    "unsloth_tiled_mlp": "memory is saved by use_gradient_checkpointing",
    "device_map_planner_kwargs": "one device is used",
    "fix_tokenizer": "the tokenizer is used as it is",
    "use_exact_model_name": "names are never replaced",
    "random_state": "it is get_peft_model's",
    "text_only": "only the language model is loaded",
    "return_logits": "logits are returned in evaluation",
    "temporary_location": "nothing is written to disk here",
    "max_seq_length": "it was given to from_pretrained",
    "max_loftq_iterations": "one iteration is done",
}
"""Arguments that choose how, and not what, is computed: taken, and said once where they ask for something."""
_NO_EFFECT: Mapping[str, Any] = {
    "fix_tokenizer": True, "random_state": 3407, "max_lora_rank": 64, "gpu_memory_utilization": 0.5,
    "disable_log_stats": True, "fullgraph": True, "temporary_location": "_unsloth_temporary_saved_buffers",
}  # fmt: skip
_EXPERTS = "fused experts are trained by `lowrank train` (adapter.target_parameters)"
_BY_NAME = "name modules by a regular expression in target_modules"
LOADING_ELSEWHERE: Mapping[str, tuple[Any, str]] = {
    "resize_model_vocab": (None, "tokens are not added here"),
    "load_in_fp8": (False, "use load_in_4bit or load_in_8bit"),
    "qat_scheme": (None, "there is no quantization-aware training"),
    "num_labels": (None, "there are no classification heads here; `lowrank train` trains reward models"),
    "id2label": (None, "there are no classification heads here"),
    "label2id": (None, "there are no classification heads here"),
    "whisper_language": (None, "speech is not trained here"),
    "whisper_task": (None, "speech is not trained here"),
    "target_parameters": (None, _EXPERTS),
    "quantization_config": (None, "use load_in_4bit or load_in_8bit"),
    "local_files_only": (False, "set the environment variable HF_HUB_OFFLINE=1"),
}
"""Arguments of Unsloth's loader that this one has not: (the value that asks for nothing, what to do instead)."""
ADAPTER_ELSEWHERE: Mapping[str, tuple[Any, str]] = {
    "bias": ("none", "biases stay frozen"),
    "layers_to_transform": (None, _BY_NAME),
    "layers_pattern": (None, _BY_NAME),
    "finetune_last_n_layers": (None, _BY_NAME),
    "target_parameters": (None, _EXPERTS),
    "qat_scheme": (None, "there is no quantization-aware training"),
    "ensure_weight_tying": (False, "embedding and head are adapted apart"),
    "task_type": ("CAUSAL_LM", "only language models are trained here"),
}
_ONE_DEVICE = ("auto", "sequential", "balanced", "balanced_low_0", "unsloth", None)
"""Values of device_map that come to the same where one device is used."""


def warn_once(sentence: str) -> None:
    """A warning, the first time."""
    if sentence not in _logged:
        _logged.add(sentence)
        _LOG.warning("%s", sentence)


def refuse(what: str, given: Mapping[str, Any], elsewhere: Mapping[str, tuple[Any, str]]) -> None:
    """ConfigError lists all of `given` that is unknown or asks for what is not here; says what has no effect."""
    problems = []
    for name, value in given.items():
        if name in WITHOUT_EFFECT:
            if value not in (None, False, _NO_EFFECT.get(name)):
                warn_once(f"{name} has no effect: {WITHOUT_EFFECT[name]}")
        elif name not in elsewhere:
            problems.append(f"{name}={value!r}: no such argument here")
        elif value != elsewhere[name][0] and value is not None:
            problems.append(f"{name}={value!r}: {elsewhere[name][1]}")
    raise_all(ConfigError, f"{what} cannot honor", problems)


def storage_of(in_4bit: bool | None, in_8bit: bool, in_16bit: bool, full: bool) -> str:
    """How weights are kept: nf4 unless something else is asked. ConfigError where two things are asked."""
    requested = {"load_in_4bit": in_4bit, "load_in_8bit": in_8bit, "load_in_16bit": in_16bit}
    chosen = [name for name, on in requested.items() if on]
    if full:
        chosen = [name for name in chosen if name != "load_in_16bit"]
        if in_4bit is None or not chosen:
            chosen = [name for name in chosen if name != "load_in_4bit"]
        if chosen:
            raise ConfigError(f"full_finetuning=True trains the weights, and {chosen[0]} keeps them rounded: leave it "
                              "out, or train an adapter")  # fmt: skip
        return "dense"
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)}: choose one")
    if in_4bit or (in_4bit is None and not chosen):
        return "nf4"
    return "int8" if in_8bit else "dense"


def device_of(device_map: Any) -> str:
    """One device for `device_map`. ConfigError for a map over several."""
    if isinstance(device_map, Mapping):
        places = {str(each) for each in device_map.values()}
        if len(places) != 1:
            raise ConfigError(f"device_map={dict(device_map)!r}: one device is used here; name one, or leave it out")
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, str | None) and device_map in _ONE_DEVICE:
        return "auto"
    if isinstance(device_map, int):
        return f"cuda:{device_map}" if torch.cuda.is_available() else "auto"
    return str(device_map)


def is_language_model(auto_model: Any) -> bool:
    """Whether `auto_model` (a class of transformers', or None) is what is loaded here anyway."""
    return auto_model is None or "CausalLM" in getattr(auto_model, "__name__", str(auto_model))


def checked(kind: Any, settings: dict[str, Any]) -> Any:
    """The settings as `kind`. ConfigError lists all that is wrong with them."""
    return settings_of(kind, settings, "these arguments cannot be used")


@contextmanager
def hub_token(token: Any) -> Generator[None, None, None]:
    """The hub's clients use `token` for a while; None, False or "": that of the environment."""
    if not isinstance(token, str) or not token:
        yield
        return
    before = os.environ.get("HF_TOKEN")
    os.environ["HF_TOKEN"] = token
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("HF_TOKEN", None)
        else:
            os.environ["HF_TOKEN"] = before

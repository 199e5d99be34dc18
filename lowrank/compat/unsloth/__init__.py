"""Unsloth's front over lowrank: a notebook written for Unsloth runs with one import changed, on a CPU too.

    from lowrank.compat.unsloth import FastLanguageModel

What Unsloth has and this has not is refused by name (ConfigError); nothing is ignored without a word. The trainers are
TRL's and transformers' own, and nothing of them is changed: `pip install 'lowrank[trl]'`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import TypeAdapter, ValidationError

try:
    from lowrank.compat.unsloth.model import DEFAULT, TunedModel
except ModuleNotFoundError as error:
    if error.name not in ("peft", "trl"):
        raise
    raise ImportError("lowrank.compat.unsloth needs PEFT and TRL: pip install 'lowrank[trl]'") from error

import lowrank.models.loading as loading
from lowrank.adapters.variants import AdapterConfig
from lowrank.checkpoints.peft_layout import CONFIG_FILE, load_adapter
from lowrank.errors import ConfigError, raise_all
from lowrank.kernels.host_memory import keep_freed_memory
from lowrank.models.config import Config as ModelConfig

_SAY = logging.getLogger(__name__)
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ONE_DEVICE = {"auto", "sequential", "balanced", "balanced_low_0", None}
"""Values of device_map that come to the same where one device is used."""
_LOADING_ELSEWHERE: Mapping[str, tuple[Any, str]] = {
    "token": (None, "set HF_TOKEN in the environment instead, so that it is in no notebook"),
    "full_finetuning": (False, "all parameters are trained by `lowrank train` with tuning: full"),
    "fast_inference": (False, "there is no vLLM in here; generate() works"),
    "resize_model_vocab": (None, "tokens are not added here"),
    "load_in_fp8": (False, "use load_in_4bit or load_in_8bit"),
    "fix_tokenizer": (True, "the tokenizer is used as it is"),
    "use_exact_model_name": (True, "names are never replaced"),
    "load_in_16bit": (True, "say load_in_4bit=False, and dtype"),
    "float8_kv_cache": (False, "the cache has the model's dtype"),
    "random_state": (3407, "give it to get_peft_model"),
}
"""Arguments of Unsloth's loader that this one has not: (the value that asks for nothing, what to do instead)."""
_ADAPTER_ELSEWHERE: Mapping[str, tuple[Any, str]] = {
    "bias": ("none", "biases stay frozen"),
    "layers_to_transform": (None, "name modules by a regular expression in target_modules"),
    "layers_pattern": (None, "name modules by a regular expression in target_modules"),
    "target_parameters": (None, "fused experts are trained by `lowrank train` (adapter.target_parameters)"),
    "qat_scheme": (None, "there is no quantisation-aware training"),
    "temporary_location": ("_unsloth_temporary_saved_buffers", "nothing is written to disk here"),
    "ensure_weight_tying": (False, "embedding and head are adapted apart"),
    "max_seq_length": (None, "it was given to from_pretrained"),
}
_STARTS = ("loftq", "pissa", "olora")
"""PEFT's values of init_lora_weights that are variants of their own here."""


class FastLanguageModel:
    """Loads a base, attaches an adapter; what TRL's and transformers' trainers train, and what saves itself."""

    @staticmethod
    def from_pretrained(
        model_name: str = "lowrank/tiny",
        max_seq_length: int | None = 2048,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        device_map: Any = "sequential",
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        revision: str | None = None,
        rope_scaling: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> tuple[TunedModel, Any]:
        """(model, tokenizer) of a folder, a hub name, or an adapter's folder, whose base comes with it.

        `dtype` None: bfloat16 where the hardware has it, else float32. `load_in_4bit`: nf4, unless the checkpoint is
        quantised already. `rope_scaling`: {"type": "yarn", "factor": 4} stretches the base's positions (linear,
        yarn, llama3). `use_gradient_checkpointing` is for an adapter's folder; else `get_peft_model` has it.
        """
        keep_freed_memory()
        _refuse("from_pretrained", others, _LOADING_ELSEWHERE)
        adapter = load_adapter(Path(model_name)) if (Path(model_name) / CONFIG_FILE).is_file() else None
        path = adapter.base_name if adapter is not None and adapter.base_name else model_name
        storage = "nf4" if load_in_4bit else "int8" if load_in_8bit else "dense"
        settings: dict[str, Any] = {
            "path": path,
            "revision": adapter.revision if adapter is not None else revision,
            "dtype": "auto" if dtype is None else str(dtype).removeprefix("torch."),
            "device": "auto" if device_map in _ONE_DEVICE else device_map,
            "attention": "padded",  # what trainers give are padded batches
            "recompute": "none",
            "trust_remote_code": trust_remote_code,
            "rope_scaling": None if rope_scaling is None else dict(rope_scaling),
        }
        if storage != "dense" and not _is_quantised(settings):
            settings["storage"] = {"type": storage}
        config = _checked(ModelConfig, settings)
        base = loading.load(config, notify=_SAY.info)
        reach = base.reach
        if max_seq_length and reach and max_seq_length > reach:
            _SAY.warning("max_seq_length=%d: this model was made for %d positions: cut texts at %d (SFTConfig: "
                         "max_length), or stretch them, rope_scaling={'type': 'yarn', 'factor': %d}",
                         max_seq_length, reach, reach, -(-max_seq_length // reach))  # fmt: skip
        model = TunedModel(base, config)
        model.max_seq_length = max_seq_length
        if adapter is not None:
            model.attach(DEFAULT, adapter.config, 0, adapter.tensors)
            _recompute(model, use_gradient_checkpointing)
        return model, base.tokenizer

    @staticmethod
    def get_peft_model(
        model: TunedModel,
        r: int = 16,
        target_modules: str | Sequence[str] = _TARGETS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        use_rslora: bool = False,
        use_dora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Mapping[str, Any] | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        **others: Any,
    ) -> TunedModel:
        """The model with a fresh adapter, the same object. PEFT's meaning of every argument.

        `use_gradient_checkpointing`: True or "unsloth" keep the input of each layer alone. `init_lora_weights`: True,
        "loftq", "pissa" or "olora".
        """
        _refuse("get_peft_model", others, _ADAPTER_ELSEWHERE)
        settings: dict[str, Any] = {
            "type": _variant(init_lora_weights, loftq_config, use_rslora, use_dora),
            "rank": r,
            "alpha": float(lora_alpha),
            "dropout": float(lora_dropout),
            "target_modules": target_modules if isinstance(target_modules, str) else tuple(target_modules),
            "modules_to_save": tuple(modules_to_save or ()),
        }
        settings |= {"rank_pattern": dict(rank_pattern)} if rank_pattern else {}
        settings |= {"alpha_pattern": dict(alpha_pattern)} if alpha_pattern else {}
        settings |= {"exclude_modules": exclude_modules} if exclude_modules else {}
        head = model.base.model.get_output_embeddings()
        name = next(path for path, module in model.base.model.named_modules() if module is head)
        asked = {*([] if isinstance(target_modules, str) else target_modules), *settings["modules_to_save"]}
        if asked & {name, name.rpartition(".")[2]}:
            raise ConfigError(
                f"{name} as a target: TRL's trainers score with the frozen head, so what is trained there would be "
                "without effect; leave it out, or train it with `lowrank train` (adapter.modules_to_save)"
            )
        model.attach(DEFAULT, _checked(AdapterConfig, settings), random_state)
        _recompute(model, use_gradient_checkpointing)
        return model

    @staticmethod
    def for_inference(model: TunedModel) -> TunedModel:
        """Evaluation mode; prompts are padded on the left."""
        model.base.tokenizer.padding_side = "left"
        return model.eval()

    @staticmethod
    def for_training(model: TunedModel, use_gradient_checkpointing: bool | str = True) -> TunedModel:
        """Training mode; texts are padded on the right."""
        model.base.tokenizer.padding_side = "right"
        _recompute(model, use_gradient_checkpointing)
        return model.train()


def is_bfloat16_supported() -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32."""
    config = ModelConfig(path="any")
    return loading.choose_dtype(config, loading.choose_device(config)) == torch.bfloat16


is_bf16_supported = is_bfloat16_supported


def _recompute(model: TunedModel, wanted: bool | str) -> None:
    if wanted in (True, "unsloth"):
        model.gradient_checkpointing_enable()
    elif wanted is False:
        model.gradient_checkpointing_disable()
    else:
        raise ConfigError(f"use_gradient_checkpointing={wanted!r}: expected True, False or 'unsloth'")


def _variant(start: bool | str, loftq_config: Mapping[str, Any] | None, rslora: bool, dora: bool) -> str:
    """The type of adapter that Unsloth's switches come to."""
    chosen = [name for name, on in (("rslora", rslora), ("dora", dora)) if on]
    if start not in (True, *_STARTS):
        raise ConfigError(f"init_lora_weights={start!r}: expected True, {', '.join(map(repr, _STARTS))}")
    chosen += [str(start)] if start is not True else []
    if loftq_config and "loftq" not in chosen:
        raise ConfigError("loftq_config goes with init_lora_weights='loftq'; its bits are those of the loaded model")
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} cannot be combined; choose one")
    return chosen[0] if chosen else "lora"


def _is_quantised(settings: Mapping[str, Any]) -> bool:
    """The checkpoint brings its own quantisation."""
    try:
        config = transformers.AutoConfig.from_pretrained(
            loading.locate(settings["path"]),
            revision=settings["revision"],
            trust_remote_code=settings["trust_remote_code"],
        )
    except (OSError, ValueError, KeyError):
        return False  # what is wrong with it the loader says
    return getattr(config.get_text_config(), "quantization_config", None) is not None or hasattr(
        config, "quantization_config"
    )


def _checked(kind: Any, settings: dict[str, Any]) -> Any:
    try:
        return TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise_all(ConfigError, "these arguments cannot be used", problems)
        raise


def _refuse(what: str, given: Mapping[str, Any], elsewhere: Mapping[str, tuple[Any, str]]) -> None:
    problems = []
    for name, value in given.items():
        if name not in elsewhere:
            problems.append(f"{name}={value!r}: no such argument here")
        elif value != elsewhere[name][0] and value is not None:
            problems.append(f"{name}={value!r}: {elsewhere[name][1]}")
    raise_all(ConfigError, f"{what} cannot honour", problems)

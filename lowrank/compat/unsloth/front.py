"""FastLanguageModel and FastModel: load a base, attach an adapter; the names, arguments and defaults are Unsloth's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

import lowrank.models.loading.pretrained as loading
from lowrank.adapters.targets import find_targets, is_linear, matches
from lowrank.adapters.variants import AdapterConfig
from lowrank.checkpoints.base_tensors import on_model
from lowrank.checkpoints.own_tokens import learn_tokens
from lowrank.checkpoints.peft_layout import load_adapter
from lowrank.compat.unsloth import full
from lowrank.compat.unsloth.arguments import (
    ADAPTER_ELSEWHERE,
    LOADING_ELSEWHERE,
    checked,
    device_of,
    hub_token,
    is_language_model,
    refuse,
    storage_of,
    warn_once,
)
from lowrank.compat.unsloth.model import DEFAULT, TunedModel
from lowrank.compat.unsloth.tokens import ids_first
from lowrank.errors import ConfigError, ModelError
from lowrank.models.config import ModelConfig
from lowrank.models.layers import Parts
from lowrank.pipelines.artifacts import adapter_folder
from lowrank.pipelines.resolve import ArtifactKind, resolve
from lowrank.third_party import code_allowed, code_is_allowed

_LOG = logging.getLogger(__name__)
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WHOLE = ("embed_tokens", "lm_head")
"""As targets they are trained whole, as copies, as in Unsloth."""
_OF_ATTENTION = ("attn", "attention", "mixer")
_OF_MLP = ("mlp", "feed_forward", "ffn", "moe", "experts", "dense")
_STARTS = ("loftq", "pissa", "olora")
"""PEFT's values of init_lora_weights that are variants of their own here."""


class FastLanguageModel:
    """Loads a base, attaches an adapter; what TRL's and transformers' trainers train, and what saves itself."""

    @staticmethod
    def from_pretrained(
        model_name: str = "lowrank/tiny",
        max_seq_length: int | None = 2048,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        device_map: Any = "sequential",
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        revision: str | None = None,
        rope_scaling: Mapping[str, Any] | None = None,
        attn_implementation: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        auto_model: Any = None,
        **others: Any,
    ) -> tuple[Any, Any]:
        """(model, tokenizer) of a folder, a hub name, or an adapter's folder, whose base comes with it.

        `dtype` None: bfloat16 where the hardware has it, else float32. `load_in_4bit` None: nf4, unless the checkpoint
        is quantized already or another storage is asked. `full_finetuning`: transformers' own model, whose weights are
        trained. `rope_scaling`: {"type": "yarn", "factor": 4} stretches the base's positions (linear, yarn, llama3).
        `use_gradient_checkpointing` is for an adapter's folder; else `get_peft_model` has it. `token`: the hub's, for
        this call. Other arguments are refused by name, or said to have no effect.
        """
        refuse("from_pretrained", others, LOADING_ELSEWHERE)
        if not is_language_model(auto_model):
            raise ConfigError(f"auto_model={auto_model!r}: only language models (...ForCausalLM) are loaded here")
        storage = storage_of(load_in_4bit, load_in_8bit, load_in_16bit, full_finetuning)
        dtype = dtype if dtype is not None else torch_dtype
        with code_allowed(trust_remote_code), hub_token(token):  # in Python, the argument is the person's word
            named = resolve(model_name, revision=revision)
            trained = named.of_run or named.kind is ArtifactKind.ADAPTER
            adapter = load_adapter(adapter_folder(model_name, "model_name")) if trained else None
            if adapter is not None and full_finetuning:
                raise ConfigError(f"{model_name} is an adapter: merge it first, or leave full_finetuning out")
            settings: dict[str, Any] = {
                "path": adapter.base_name if adapter is not None and adapter.base_name else model_name,
                "revision": adapter.revision if adapter is not None else revision,
                "dtype": "auto" if dtype is None else str(dtype).removeprefix("torch."),
                "device": device_of(device_map),
                "attention": "padded",  # what trainers give are padded batches
                "activation_checkpointing": "none",
                "trust_remote_code": trust_remote_code,
                "rope_scaling": None if rope_scaling is None else dict(rope_scaling),
            }
            if storage != "dense" and not _is_quantized(settings):
                settings["storage"] = {"type": storage}
            config = checked(ModelConfig, settings)
            base = loading.load(config, notify=_LOG.info, train_all=full_finetuning)
            if base.prompt_type is not None:
                raise ConfigError(
                    f"{model_name} reads prompts both ways, and trainers do not tell it where they end, so its answers "
                    "would be seen: train it by lowrank's own settings (docs/pictures.md)"
                )
            if attn_implementation is not None and attn_implementation != base.own_attention:
                base.model.set_attn_implementation(attn_implementation)
                base.own_attention = attn_implementation
            if trained:
                for notice in learn_tokens(base.tokenizer, {model_name: adapter_folder(model_name, "model_name")}):
                    warn_once(notice)
            _too_long(max_seq_length, base.max_positions)
            if full_finetuning:
                model: Any = full.prepared(base, config)
                _checkpoint_activations(model, use_gradient_checkpointing)
            else:
                model = TunedModel(base, config)
            model.max_seq_length = max_seq_length
            if adapter is not None:
                adapter = on_model(adapter, base.model)
                model.attach(DEFAULT, adapter.config, 0, adapter.tensors)
                _checkpoint_activations(model, use_gradient_checkpointing)
            return model, ids_first(base.tokenizer)

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: str | Sequence[str] | None = _TARGETS,
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
        finetune_vision_layers: bool = False,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        **others: Any,
    ) -> Any:
        """The model with a fresh adapter, the same object. PEFT's meaning of every argument.

        `use_gradient_checkpointing`: True or "unsloth" keep the input of each layer alone. `init_lora_weights`: True,
        "loftq", "pissa" or "olora". `target_modules` None or "all-linear": all linear layers, of attention or the MLPs
        alone where a `finetune_...` says so; `embed_tokens` and `lm_head` are trained whole, as copies. A model that
        has such an adapter already stays as it is; ConfigError where it has another.
        """
        refuse("get_peft_model", others, ADAPTER_ELSEWHERE)
        if full.is_full(model):
            warn_once("full_finetuning: the weights themselves are trained, get_peft_model adds nothing")
            return model
        parts = {
            "freeze_vision_tower": not finetune_vision_layers,
            "freeze_language_model": not finetune_language_layers,
        }
        if not Parts(model.base.model).has_tower:
            if not finetune_language_layers:
                raise ConfigError("finetune_language_layers=False: this model is nothing but a language model")
            if finetune_vision_layers:
                warn_once("finetune_vision_layers has no effect: this model has no tower for pictures")
            parts = {}
        wanted: Any = target_modules if isinstance(target_modules, str | None) else tuple(target_modules)
        whole: tuple[str, ...] = tuple(modules_to_save or ())
        if isinstance(wanted, tuple):
            whole += tuple(name for name in _WHOLE if name in wanted and name not in whole)
            wanted = _present(model, tuple(name for name in wanted if name not in _WHOLE))
        elif wanted in (None, "all-linear"):
            wanted = _parts(model, finetune_attention_modules, finetune_mlp_modules, parts)
        settings: dict[str, Any] = {
            "type": _variant(init_lora_weights, loftq_config, use_rslora, use_dora),
            "rank": r,
            "alpha": float(lora_alpha),
            "dropout": float(lora_dropout),
            "target_modules": wanted,
            "modules_to_save": whole,
        }
        settings |= parts if not isinstance(wanted, str) or wanted == "all-linear" else {}
        settings |= {"rank_pattern": dict(rank_pattern)} if rank_pattern else {}
        settings |= {"alpha_pattern": dict(alpha_pattern)} if alpha_pattern else {}
        settings |= {"exclude_modules": exclude_modules} if exclude_modules else {}
        config = checked(AdapterConfig, settings)
        if DEFAULT in model.slots:
            _same(model, config)
        else:
            model.attach(DEFAULT, config, random_state)
        _checkpoint_activations(model, use_gradient_checkpointing)
        return model

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Evaluation mode; prompts are padded on the left."""
        full.tokenizer_of(model).padding_side = "left"
        return model.eval()

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str = True) -> Any:
        """Training mode; texts are padded on the right."""
        full.tokenizer_of(model).padding_side = "right"
        _checkpoint_activations(model, use_gradient_checkpointing)
        return model.train()


class FastModel(FastLanguageModel):
    """The same: only language models are loaded here. Its adapters go to all linear layers unless told otherwise."""

    @staticmethod
    def get_peft_model(  # pyright: ignore[reportIncompatibleMethodOverride]
        model: Any, r: int = 16, target_modules: str | Sequence[str] | None = None, **others: Any
    ) -> Any:
        """As of FastLanguageModel; `target_modules` None: all linear layers."""
        return FastLanguageModel.get_peft_model(model, r, target_modules, **others)


def is_bfloat16_supported() -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32."""
    config = ModelConfig(path="any")
    return loading.choose_dtype(config, loading.choose_device(config)) == torch.bfloat16


def _too_long(length: int | None, reach: int | None) -> None:
    if length and reach and length > reach:
        _LOG.warning("max_seq_length=%d: this model was made for %d positions: cut texts at %d (SFTConfig: "
                     "max_length), or stretch them, rope_scaling={'type': 'yarn', 'factor': %d}",
                     length, reach, reach, -(-length // reach))  # fmt: skip


def _checkpoint_activations(model: Any, wanted: bool | str) -> None:
    if wanted in (True, "unsloth", "true"):
        model.gradient_checkpointing_enable()
    elif wanted in (False, None, "false"):
        model.gradient_checkpointing_disable()
    else:
        raise ConfigError(f"use_gradient_checkpointing={wanted!r}: expected True, False or 'unsloth'")


def _present(model: Any, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Those that some layer has, as PEFT takes them; said where one has none, ModelError where all have none."""
    names = [name for name, module in model.base.model.named_modules() if is_linear(module)]
    there = tuple(each for each in wanted if any(matches(name, (each,)) for name in names))
    if there and len(there) < len(wanted):
        gone = ", ".join(each for each in wanted if each not in there)
        _LOG.warning("target_modules: this model has no linear layer %s; the others are adapted", gone)
        return there
    return wanted


def _parts(model: Any, attention: bool, mlp: bool, parts: Mapping[str, bool]) -> Any:
    """All linear layers of the parts that are not frozen, or those of the attention or of the MLPs alone."""
    if attention and mlp:
        return "all-linear"
    kinds = _OF_ATTENTION if attention else _OF_MLP if mlp else ()
    everything = find_targets(
        model.base.model, checked(AdapterConfig, {"target_modules": "all-linear", **parts})
    ).linears
    chosen = tuple(name for name in everything if any(kind in name.rpartition(".")[0] for kind in kinds))
    if not chosen:
        raise ModelError("finetune_attention_modules, finetune_mlp_modules: no linear layer is left to train")
    return chosen


def _same(model: TunedModel, wanted: AdapterConfig) -> None:
    """The adapter that is there is what is asked for. ConfigError names what is not."""
    own = model.bank.slots[model.slots[DEFAULT]].config
    problems = []
    for name in ("type", "rank", "alpha", "dropout", "modules_to_save", "rank_pattern", "alpha_pattern"):
        there, requested = (getattr(each, name, None) for each in (own, wanted))
        if there != requested and not (not there and not requested):
            problems.append(f"{name}: {there!r} is there, {requested!r} is asked")
    layers = [set(find_targets(model.base.model, each).linears) for each in (own, wanted)]
    if layers[0] != layers[1]:
        problems.append(f"target_modules: {own.target_modules!r} is there, {wanted.target_modules!r} is asked")
    if problems:
        raise ConfigError("get_peft_model: the model has an adapter already, and it is another one\n  "
                          + "\n  ".join(problems)
                          + "\n  load the base anew, or model.delete_adapter('default') first")  # fmt: skip
    _LOG.warning("get_peft_model: the model has this adapter already; it is kept, with what it has learned")


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


def _is_quantized(settings: Mapping[str, Any]) -> bool:
    """The checkpoint brings its own quantization."""
    try:
        config = transformers.AutoConfig.from_pretrained(
            loading.locate(settings["path"]),
            revision=settings["revision"],
            trust_remote_code=settings["trust_remote_code"] and code_is_allowed(),
        )
    except loading.FILE_FAULTS:
        return False  # what is wrong with it the loader says
    return getattr(config.get_text_config(), "quantization_config", None) is not None or hasattr(
        config, "quantization_config"
    )

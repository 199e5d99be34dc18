"""What of a LLaMA-Factory file says how is trained: base, tuning, adapter, objective, optimizer, schedule."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from lowrank.compat.llamafactory.keys import Keys
from lowrank.errors import did_you_mean
from lowrank.foreign_files import find_json
from lowrank.media.limits import MediaLimits
from lowrank.models.packaged import locate

OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_apex_fused": "adamw",
    "adamw_anyprecision": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion": "lion",
    "lion_32bit": "lion",
    "adafactor": "adafactor",
    "sgd": "sgd",
    "schedule_free_adamw": "schedule_free",
}
WITHOUT_BETAS = ("sgd", "adafactor", "lion")
VARIANTS = {"use_dora": "dora", "use_rslora": "rslora", "pissa_init": "pissa"}
"""Keys that choose another adapter than LoRA; one at most, but for the first two, which are `rsdora` together."""
METHODS = {
    "use_galore": "galore",
    "use_apollo": "apollo",
    "use_badam": "badam",
    "use_adam_mini": "adam_mini",
    "use_muon": "muon",
}
"""Keys that choose an optimizer; one at most."""
LOSSES = {"use_dft_loss": "dft", "use_asft_loss": "asft", "use_eaft_loss": "eaft"}
"""Keys that choose another loss of stage sft; one at most."""
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_restarts": "cosine_with_restarts",
    "inverse_sqrt": "inverse_sqrt",
    "polynomial": "polynomial",
    "warmup_stable_decay": "warmup_stable_decay",
}
POLYNOMIAL_END = 1e-7
"""Where transformers' polynomial schedule ends, unless `lr_end` says otherwise."""
STAGES = {"sft": "sft", "pt": "pretrain", "dpo": "dpo", "kto": "kto", "rm": "reward", "ppo": "ppo"}
"""`stage` -> `objective.type`; for dpo, `pref_loss` may name another."""
PREFERENCE_LOSSES = ("sigmoid", "hinge", "ipo", "orpo", "simpo")
FROZEN_PARTS = ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")


def model(keys: Keys, problems: list[str], warnings: list[str]) -> dict[str, Any]:
    """The base: where it is, how it is kept and computes."""
    found: dict[str, Any] = {"path": keys.model_name_or_path}
    if keys.model_revision != "main":
        found["revision"] = keys.model_revision
    if keys.bf16 or keys.pure_bf16:
        found["dtype"] = "bfloat16"
    elif keys.fp16:
        found["dtype"] = "float16"
    if keys.use_cpu or keys.no_cuda:
        found["device"] = "cpu"
    limits = {each.name: getattr(keys, each.name) for each in fields(MediaLimits)}
    for kind in ("image", "video"):
        own = {name: value for name, value in limits.items() if name.startswith(kind)}
        if own != {name: value for name, value in vars(MediaLimits()).items() if name.startswith(kind)}:
            found |= own
    found["activation_checkpointing"] = "none" if keys.disable_gradient_checkpointing else "full"
    if keys.trust_remote_code:
        found["trust_remote_code"] = True
    if keys.moe_aux_loss_coef:
        found["router_aux_loss_coef"] = keys.moe_aux_loss_coef
    if keys.train_from_scratch:
        found["random_init"] = keys.seed
    if keys.quantization_bit is not None:
        found["storage"] = _storage(keys)
    if keys.mixture_of_depths == "convert":
        found["layer_wrapper"] = {"type": "mixture_of_depths"}
    if keys.shift_attn:
        found["shift_attn"] = max(2, keys.cutoff_len // 4 // 2 * 2)
    if keys.rope_scaling is not None:
        found |= _rope_scaling(keys, problems, warnings)
    return found


def _storage(keys: Keys) -> dict[str, Any]:
    if keys.quantization_method == "hqq":
        return {"type": "hqq", "bits": keys.quantization_bit}
    if keys.quantization_method == "eetq":
        return {"type": "eetq"}
    if keys.quantization_bit == 8:
        return {"type": "int8"}
    return {"type": keys.quantization_type, "double_quant": keys.double_quantization}


def _rope_scaling(keys: Keys, problems: list[str], warnings: list[str]) -> dict[str, Any]:
    """As much as `cutoff_len` needs, as in LLaMA-Factory."""
    config = Path(locate(keys.model_name_or_path)) / "config.json"
    try:
        reach = int((find_json(config) or {})["max_position_embeddings"])
    except (ValueError, KeyError, TypeError):
        problems.append(
            f"rope_scaling: how far {keys.model_name_or_path} reads is not known here, so neither is the factor; "
            f"remove it and add model.rope_scaling.type={keys.rope_scaling} model.rope_scaling.factor=... to the "
            "command line"
        )
        return {}
    if keys.cutoff_len <= reach:
        warnings.append(f"rope_scaling has no effect: the base reads {reach} tokens, cutoff_len is {keys.cutoff_len}")
        return {}
    return {"rope_scaling": {"type": keys.rope_scaling, "factor": float(math.ceil(keys.cutoff_len / reach))}}


def tuning(keys: Keys) -> dict[str, Any]:
    """What is trained."""
    if keys.finetuning_type != "freeze":
        return {"tuning": "full" if keys.finetuning_type == "full" else "adapter"}
    freeze: dict[str, Any] = {
        "trainable_layers": keys.freeze_trainable_layers,
        "trainable_modules": list(keys.freeze_trainable_modules),
        "extra_modules": list(keys.freeze_extra_modules),
    }
    if keys.use_llama_pro:
        freeze["spread"] = True
    return {"tuning": "freeze", "freeze": freeze}


def adapter(keys: Keys) -> dict[str, Any]:
    """What is put on the base; empty where the base itself is trained."""
    if keys.finetuning_type in ("full", "freeze"):
        return {}
    if keys.finetuning_type == "oft":
        block = {"block_size": keys.oft_block_size} if keys.oft_block_size else {}
        return {"type": "oft", "target_modules": _targets(keys.oft_target), **block, **_parts(keys)}
    kind = next((name for key, name in VARIANTS.items() if getattr(keys, key)), "lora")
    kind = "rsdora" if keys.use_dora and keys.use_rslora else kind
    found: dict[str, Any] = {"type": kind, "rank": keys.lora_rank, "target_modules": _targets(keys.lora_target)}
    optional = {
        "alpha": keys.lora_alpha,
        "dropout": keys.lora_dropout,
        "modules_to_save": list(keys.additional_target),
        "trainable_token_indices": _new_tokens(keys),
        "path": keys.adapter_name_or_path[0] if keys.adapter_name_or_path else None,
        "loraplus_lr_ratio": keys.loraplus_lr_ratio,
        "loraplus_lr_embedding": keys.loraplus_lr_embedding if keys.loraplus_lr_ratio else None,
    }
    found |= {key: value for key, value in optional.items() if value} | _parts(keys)
    if kind == "pissa":
        found["niter"] = max(0, keys.pissa_iter)
    return found


def _parts(keys: Keys) -> dict[str, bool]:
    """Which parts of a model that sees pictures are adapted, where that is not the language model alone."""
    defaults = {name: Keys.model_fields[name].default for name in FROZEN_PARTS}
    return {name: getattr(keys, name) for name in FROZEN_PARTS if getattr(keys, name) != defaults[name]}


def _new_tokens(keys: Keys) -> list[str]:
    """Tokens whose rows are trained alone; not where embedding and head are trained whole, as LLaMA-Factory has it."""
    whole = any(name.endswith(("embed_tokens", "lm_head", "wte", "word_embeddings")) for name in keys.additional_target)
    return [] if whole else [*keys.add_tokens, *keys.add_special_tokens, *keys.new_special_tokens]


def _targets(names: tuple[str, ...]) -> str | list[str]:
    return "all-linear" if names == ("all",) else list(names)


def objective(keys: Keys, warnings: list[str]) -> dict[str, Any]:
    """The objective of the stage. What plays no part in it is left out; where it was set, that is said."""
    name = STAGES.get(keys.stage, "sft")
    if name == "dpo" and keys.pref_loss in ("orpo", "simpo"):
        name = keys.pref_loss
    reference = keys.ref_model_adapters or keys.ref_model
    shared = {"beta": keys.pref_beta, "pref_ftx": keys.pref_ftx}
    shared |= {"reference_model": reference} if reference else {}
    used: dict[str, dict[str, Any]] = {
        "sft": _sft(keys),
        "pretrain": {"label_smoothing": keys.label_smoothing_factor} if keys.label_smoothing_factor else {},
        "dpo": shared
        | {"loss_type": keys.pref_loss, "label_smoothing": keys.dpo_label_smoothing}
        | ({"ld_alpha": keys.ld_alpha} if keys.ld_alpha is not None else {})
        | ({"bco_weight": keys.pref_bco_weight} if keys.pref_bco_weight else {}),
        "orpo": {"beta": keys.pref_beta},
        "simpo": {"beta": keys.pref_beta, "gamma": keys.simpo_gamma},
        "ppo": {
            "num_ppo_epochs": keys.ppo_epochs,
            "score_norm": keys.ppo_score_norm,
            "whiten_rewards": keys.ppo_whiten_rewards,
            "reward_model": keys.reward_model,
            "kl_coef": 0.2,  # where TRL's adaptive controller begins
            "max_completion_length": keys.max_new_tokens,
            "temperature": keys.temperature,
            "top_p": keys.top_p,
            "top_k": keys.top_k,
        },
        "kto": shared | {"desirable_weight": keys.kto_chosen_weight, "undesirable_weight": keys.kto_rejected_weight},
    }
    found = {"type": name} | used.get(name, {})
    if keys.pref_ftx and "pref_ftx" not in found:
        warnings.append(f"pref_ftx has no effect with objective {name}")
    if name == "dpo" and keys.pref_loss not in ("sigmoid", "hinge", "ipo"):
        found["loss_type"] = "sigmoid"  # refused elsewhere; the rest is checked all the same
    return found


def _sft(keys: Keys) -> dict[str, Any]:
    """The loss of stage sft."""
    loss = next((name for key, name in LOSSES.items() if getattr(keys, key)), None)
    if loss is None:
        return {"label_smoothing": keys.label_smoothing_factor} if keys.label_smoothing_factor else {}
    alpha = {"asft": {"asft_alpha": keys.asft_alpha}, "eaft": {"eaft_alpha": keys.eaft_alpha}}
    return {"loss_type": loss} | alpha.get(loss, {})


def optimizer(keys: Keys, problems: list[str]) -> dict[str, Any]:
    """How parameters are updated."""
    if keys.optim not in OPTIMIZERS:
        problems.append(f"optim: {keys.optim!r} is not supported{did_you_mean(keys.optim, OPTIMIZERS)}")
    chosen = next((name for key, name in METHODS.items() if getattr(keys, key)), None)
    if chosen == "galore" and OPTIMIZERS.get(keys.optim) == "adamw_8bit":
        chosen = "galore_8bit"
    elif chosen and OPTIMIZERS.get(keys.optim) not in ("adamw", None):
        problems.append(f"optim: {keys.optim} inside of use_{chosen} is not there; remove optim")
    kind = chosen or OPTIMIZERS.get(keys.optim, "adamw")
    found: dict[str, Any] = {
        "type": kind,
        "learning_rate": keys.learning_rate,
        "weight_decay": keys.weight_decay,
        "max_grad_norm": keys.max_grad_norm or None,
    }
    if kind not in WITHOUT_BETAS:
        found |= {"betas": [keys.adam_beta1, keys.adam_beta2], "eps": keys.adam_epsilon}
    elif kind == "lion":
        found["betas"] = [keys.adam_beta1, keys.adam_beta2]
    if kind in ("galore", "galore_8bit", "apollo"):
        prefix = kind.removesuffix("_8bit")
        targets = getattr(keys, f"{prefix}_target")
        found["targets"] = "all" if targets == ("all",) else list(targets)
        found |= {name: getattr(keys, f"{prefix}_{name}") for name in ("rank", "update_interval", "scale")}
        if getattr(keys, f"{prefix}_layerwise"):
            found |= {"layerwise": True, "max_grad_norm": None}  # there, too, nothing is left that could be clipped
    if kind == "badam":
        found |= {name: getattr(keys, f"badam_{name}") for name in ("start_block", "switch_mode", "switch_interval")}
    if kind == "apollo":
        found["scale_type"] = keys.apollo_scale_type
    return found


def schedule(keys: Keys, problems: list[str], warnings: list[str]) -> dict[str, Any]:
    """`schedule` as our settings have it. Adds what cannot be honored to `problems`, and what has no effect to
    `warnings`."""
    name, extra = keys.lr_scheduler_type, dict(keys.lr_scheduler_kwargs)
    if name not in SCHEDULES:
        problems.append(f"lr_scheduler_type: {name!r} is not supported{did_you_mean(name, SCHEDULES)}")
    found: dict[str, Any] = {"type": SCHEDULES.get(name, "linear")}
    if name == "cosine_with_min_lr":
        floor = extra.pop("min_lr", None)
        found["min_ratio"] = extra.pop("min_lr_rate", 0.0) if floor is None else floor / keys.learning_rate
    if name == "cosine_with_restarts":
        found["num_cycles"] = extra.pop("num_cycles", 1)
    if name == "polynomial":
        found["min_ratio"] = min(1.0, extra.pop("lr_end", POLYNOMIAL_END) / keys.learning_rate)
        found["power"] = extra.pop("power", 1.0)
    if name == "warmup_stable_decay":
        found["min_ratio"] = extra.pop("min_lr_ratio", 0.0)
        found |= {key: extra.pop(key) for key in ("num_stable_steps", "num_decay_steps", "decay_type") if key in extra}
    problems += [f"lr_scheduler_kwargs: {key!r} is not supported with {name}; remove it" for key in extra]
    if name == "constant":
        if keys.warmup_steps or keys.warmup_ratio:
            warnings.append("warmup has no effect with lr_scheduler_type: constant (constant_with_warmup has one)")
        return found
    return found | _warmup(keys, warnings)


def _warmup(keys: Keys, warnings: list[str]) -> dict[str, Any]:
    if keys.warmup_steps and keys.warmup_ratio:
        warnings.append("warmup_ratio has no effect, since warmup_steps is set")
    if keys.warmup_steps >= 1:
        return {"warmup_steps": int(keys.warmup_steps)}
    ratio = keys.warmup_steps or keys.warmup_ratio
    return {"warmup_ratio": ratio} if ratio else {}

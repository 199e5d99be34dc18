"""Keys of a LLaMA-Factory file that cannot be honored together, or not with what they say."""

from __future__ import annotations

from lowrank.compat.llamafactory.keys import Keys
from lowrank.compat.llamafactory.method import FROZEN_PARTS, LOSSES, METHODS, PREFERENCE_LOSSES, STAGES, VARIANTS
from lowrank.compat.llamafactory.run import METRICS
from lowrank.errors import did_you_mean

HQQ_BITS = (8, 6, 5, 4, 3, 2, 1)
OF_LORA = ("adapter_name_or_path", *VARIANTS, "loraplus_lr_ratio")


def contradictions(keys: Keys) -> list[str]:
    """A line for each, with the way out."""
    found = [*_of_metric(keys)]
    if not keys.do_train:
        found.append("do_train: it is not set, so LLaMA-Factory would not train; set do_train: true")
    if keys.stage not in STAGES:
        all_stages = ", ".join(STAGES)
        way = f"choose one of {all_stages}{did_you_mean(keys.stage, STAGES)}"
        found.append(f"stage: {keys.stage!r} is not trained; {way}")
    found += _of_method(keys)
    if keys.stage == "ppo" and keys.reward_model is None:
        found.append("reward_model: required for stage: ppo; name the folder of an adapter trained with stage: rm")
    if keys.stage == "ppo" and keys.reward_model_type != "lora":
        found.append(
            f"reward_model_type: {keys.reward_model_type!r} is not supported; train an adapter with stage: rm on "
            "the same base (lora), or use objective.reward_funcs in the native form"
        )
    if len(keys.adapter_name_or_path) > 1 and not keys.create_new_adapter:
        found.append("adapter_name_or_path: training goes on with one adapter; merge the others into the base first")
    if keys.bf16 and keys.fp16:
        found.append("bf16 and fp16: set only one")
    if keys.val_size >= 1 and keys.val_size != int(keys.val_size):
        found.append(f"val_size: expected a share below 1, or a whole number of rows, got {keys.val_size:g}")
    if keys.val_size and keys.eval_dataset:
        found.append("val_size and eval_dataset: set only one")
    if keys.mask_history and keys.train_on_prompt:
        found.append("mask_history and train_on_prompt: set only one")
    if keys.stage == "pt" and (keys.mask_history or keys.train_on_prompt or keys.neat_packing):
        found.append("mask_history, train_on_prompt and neat_packing are only for stage: sft; remove them")
    if keys.stage == "dpo" and keys.pref_loss not in PREFERENCE_LOSSES:
        way = "use stage: kto" if keys.pref_loss == "kto_pair" else f"choose {', '.join(PREFERENCE_LOSSES)}"
        found.append(f"pref_loss: {keys.pref_loss!r} is not supported; {way}")
    if keys.stage == "dpo" and keys.dpo_label_smoothing and keys.pref_loss != "sigmoid":
        found.append("dpo_label_smoothing: only for pref_loss: sigmoid; remove it")
    return found


def _of_metric(keys: Keys) -> list[str]:
    name = keys.metric_for_best_model
    if name not in METRICS:
        return [f"metric_for_best_model: {name!r} is not supported; choose {', '.join(METRICS)}"]
    if METRICS[name] != "loss" and not keys.predict_with_generate:
        return [f"metric_for_best_model: {name!r} is of generated answers; set predict_with_generate: true too"]
    if METRICS[name] == "loss" and keys.predict_with_generate and not keys.do_predict:
        return [
            "predict_with_generate: training generates only for a metric_for_best_model of generated answers, as "
            "eval_rouge-l; set one, or remove it and measure the result with `lowrank predict`"
        ]
    return []


def _of_method(keys: Keys) -> list[str]:
    """About the base, what is trained of it, and the loss."""
    found = []
    kinds = ("lora", "oft", "freeze", "full")
    if keys.finetuning_type not in kinds:
        found.append(f"finetuning_type: {keys.finetuning_type!r} is not there; choose {', '.join(kinds)}")
    if keys.finetuning_type in ("freeze", "full"):
        found += [f"{key}: only for finetuning_type: lora; remove it" for key in OF_LORA if getattr(keys, key)]
        found += [
            f"{key}: with finetuning_type: {keys.finetuning_type} the language model alone is trained; remove it, or "
            "set finetuning_type: lora"
            for key in FROZEN_PARTS
            if getattr(keys, key) != Keys.model_fields[key].default
        ]
    for family in (VARIANTS, METHODS):
        chosen = [key for key in family if getattr(keys, key)]
        if len(chosen) > 1 and chosen != ["use_dora", "use_rslora"]:
            found.append(f"{' and '.join(chosen)}: set only one")
    losses = [key for key in LOSSES if getattr(keys, key)]
    losses += ["label_smoothing_factor"] if keys.label_smoothing_factor else []
    if len(losses) > 1:
        found.append(f"{' and '.join(losses)}: set only one")
    wrong = [key for key in losses if keys.stage != "sft" and not (keys.stage == "pt" and key not in LOSSES)]
    found += [f"{key}: not with stage: {keys.stage}; remove it" for key in wrong]
    of_dpo = keys.stage == "dpo" and keys.pref_loss not in ("orpo", "simpo")
    found += [
        f"{key}: only for stage: dpo with a reference (not orpo, simpo); remove it"
        for key in ("pref_bco_weight", "ld_alpha")
        if getattr(keys, key) and not of_dpo
    ]
    found += [
        f"{key}: stage {keys.stage} compares with no other model; remove it"
        for key in ("ref_model", "ref_model_adapters")
        if getattr(keys, key) and not of_dpo and keys.stage != "kto"
    ]
    if keys.ref_model_adapters and "," in keys.ref_model_adapters:
        found.append("ref_model_adapters: give one adapter; `lowrank export` merges several")
    if keys.train_from_scratch and keys.finetuning_type != "full":
        found.append("train_from_scratch: random weights are nothing to put an adapter on; set finetuning_type: full")
    if keys.create_new_adapter and keys.adapter_name_or_path:
        found.append(
            "create_new_adapter: the given adapter is merged into the base first, as `lowrank train FILE` does; else "
            f"`lowrank export {keys.adapter_name_or_path[0]} --base {keys.model_name_or_path} --to merged`, and name "
            "what it writes as model_name_or_path"
        )
    if keys.use_llama_pro and keys.finetuning_type != "freeze":
        found.append("use_llama_pro: only for finetuning_type: freeze, on a model that `lowrank expand` wrote")
    bits, kind = keys.quantization_bit, keys.quantization_method
    allowed = {"bnb": (4, 8), "hqq": HQQ_BITS, "eetq": (8,)}.get(kind)
    if bits is not None and allowed is None:
        found.append(f"quantization_method: {kind!r} is not there; choose bnb, hqq or eetq")
    elif bits is not None and allowed is not None and bits not in allowed:
        found.append(f"quantization_bit: {kind} has {', '.join(map(str, sorted(allowed)))} bits, not {bits}")
    return found

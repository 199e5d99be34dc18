"""What settings are called in PEFT, TRL, transformers' TrainingArguments and LLaMA-Factory, for who writes such a name.

    lora_r       -> adapter.rank
    load_in_4bit -> model.storage: nf4      a value that means the same
    do_sample    -> temperature             and a word about it, where the names are not for the same thing

Settings that have the same name elsewhere need no entry: a `learning_rate` at the top is found in `optimizer`.
"""

from __future__ import annotations

from collections.abc import Collection

from lowrank.errors import plain_name

_BATCH = "the samples of a whole optimizer step, which is cut into micro-batches by itself"
_CHECKPOINTING = "none, selective, full, sqrt, offload, or a number of layers"
_TRAIN = "data alone is short for it"
_PACKING = "forward passes are always packed; this fills each optimizer step with tokens"
_STEPS = "a number of steps, or below 1 a share of the run; null: only at the end"

PEER_NAMES: dict[str, tuple[str, str]] = {
    "model_name": ("model.path", ""),
    "model_name_or_path": ("model.path", ""),
    "model_id": ("model.path", ""),
    "base_model": ("model.path", ""),
    "pretrained_model_name_or_path": ("model.path", ""),
    "model_revision": ("model.revision", ""),
    "torch_dtype": ("model.dtype", ""),
    "bf16": ("model.dtype: bfloat16", ""),
    "pure_bf16": ("model.dtype: bfloat16", ""),
    "fp16": ("model.dtype: float16", ""),
    "load_in_4bit": ("model.storage: nf4", ""),
    "load_in_8bit": ("model.storage: int8", ""),
    "quantization_bit": ("model.storage", "nf4 for 4 bits, int8 for 8"),
    "quantization_config": ("model.storage", "nf4, fp4, int8 ..."),
    "bnb_4bit_quant_type": ("model.storage", "nf4 or fp4"),
    "use_cpu": ("model.device: cpu", ""),
    "no_cuda": ("model.device: cpu", ""),
    "device_map": ("model.device", "one device; several by devices and base"),
    "attn_implementation": ("model.attention", ""),
    "flash_attn": ("model.attention", ""),
    "gradient_checkpointing": ("model.activation_checkpointing", _CHECKPOINTING),
    "use_gradient_checkpointing": ("model.activation_checkpointing", _CHECKPOINTING),
    "gradient_checkpointing_kwargs": ("model.activation_checkpointing", _CHECKPOINTING),
    "disable_gradient_checkpointing": ("model.activation_checkpointing: none", ""),
    "moe_aux_loss_coef": ("model.router_aux_loss_coef", ""),
    "dataset": ("data.train", _TRAIN),
    "train_dataset": ("data.train", _TRAIN),
    "train_data": ("data.train", _TRAIN),
    "train_file": ("data.train", _TRAIN),
    "eval_dataset": ("data.eval", ""),
    "eval_data": ("data.eval", ""),
    "validation_file": ("data.eval", ""),
    "formatting_func": ("data.train", "an entry has a format, which may be a function"),
    "dataset_text_field": ("data.train", "an entry has columns"),
    "val_size": ("data.validation_split", ""),
    "test_size": ("data.validation_split", ""),
    "max_train_samples": ("data.max_samples", ""),
    "max_seq_length": ("data.max_length", ""),
    "max_seq_len": ("data.max_length", ""),
    "model_max_length": ("data.max_length", ""),
    "cutoff_len": ("data.max_length", ""),
    "sequence_len": ("data.max_length", ""),
    "per_device_train_batch_size": ("data.batch_size", _BATCH),
    "per_device_batch_size": ("data.batch_size", _BATCH),
    "train_batch_size": ("data.batch_size", _BATCH),
    "micro_batch_size": ("data.batch_size", _BATCH),
    "gradient_accumulation_steps": ("data.batch_size", _BATCH),
    "per_device_eval_batch_size": ("micro_batch_tokens", "the tokens of a forward pass, also of an evaluation"),
    "auto_find_batch_size": ("micro_batch_tokens: auto", ""),
    "packing": ("data.batch_tokens", _PACKING),
    "neat_packing": ("data.batch_tokens", _PACKING),
    "template": ("data.chat_template", ""),
    "tokenizer": ("data.chat_template", "the tokenizer itself comes with the model"),
    "processing_class": ("data.chat_template", "the tokenizer itself comes with the model"),
    "train_on_inputs": ("data.train_on_prompt", ""),
    "completion_only_loss": ("data.train_on_prompt", "false: only answers are learned, as it is by default"),
    "assistant_only_loss": ("data.train_on_prompt", "false: only answers are learned, as it is by default"),
    "mix_strategy": ("data.mix", ""),
    "disable_shuffling": ("data.shuffle: false", ""),
    "peft_config": ("adapter", "its rank, alpha, dropout, target_modules ..."),
    "lora_config": ("adapter", "its rank, alpha, dropout, target_modules ..."),
    "r": ("adapter.rank", ""),
    "lora_r": ("adapter.rank", ""),
    "lora_rank": ("adapter.rank", ""),
    "lora_alpha": ("adapter.alpha", ""),
    "lora_dropout": ("adapter.dropout", ""),
    "lora_target": ("adapter.target_modules", ""),
    "lora_targets": ("adapter.target_modules", ""),
    "lora_target_modules": ("adapter.target_modules", ""),
    "additional_target": ("adapter.modules_to_save", ""),
    "peft_type": ("adapter.type", ""),
    "init_lora_weights": ("adapter.type", "pissa, olora, eva, loftq ..."),
    "use_rslora": ("adapter.type: rslora", ""),
    "use_dora": ("adapter.type: dora", ""),
    "pissa_init": ("adapter.type: pissa", ""),
    "pissa_iter": ("adapter.niter", ""),
    "oft_block_size": ("adapter.block_size", ""),
    "oft_target": ("adapter.target_modules", ""),
    "adapter_name_or_path": ("adapter.path", ""),
    "finetuning_type": ("tuning", ""),
    "freeze_trainable_layers": ("freeze.trainable_layers", ""),
    "freeze_trainable_modules": ("freeze.trainable_modules", ""),
    "freeze_extra_modules": ("freeze.extra_modules", ""),
    "stage": ("objective.type", ""),
    "label_smoothing_factor": ("objective.label_smoothing", ""),
    "dpo_label_smoothing": ("objective.label_smoothing", ""),
    "pref_loss": ("objective.loss_type", ""),
    "pref_beta": ("objective.beta", ""),
    "pref_bco_weight": ("objective.bco_weight", ""),
    "simpo_gamma": ("objective.gamma", ""),
    "ref_model": ("objective.reference_model", ""),
    "kto_chosen_weight": ("objective.desirable_weight", ""),
    "kto_rejected_weight": ("objective.undesirable_weight", ""),
    "reward_processing_classes": ("objective.reward_funcs", ""),
    "ppo_epochs": ("objective.num_ppo_epochs", ""),
    "ppo_score_norm": ("objective.score_norm", ""),
    "ppo_whiten_rewards": ("objective.whiten_rewards", ""),
    "lr": ("optimizer.learning_rate", ""),
    "optim": ("optimizer.type", ""),
    "adam_beta1": ("optimizer.betas", "both of them in a list"),
    "adam_beta2": ("optimizer.betas", "both of them in a list"),
    "adam_epsilon": ("optimizer.eps", ""),
    "clip_grad_norm": ("optimizer.max_grad_norm", ""),
    "gradient_clipping": ("optimizer.max_grad_norm", ""),
    "lr_scheduler": ("schedule.type", ""),
    "lr_scheduler_type": ("schedule.type", ""),
    "lr_scheduler_kwargs": ("schedule", "its min_ratio, num_cycles, power ..."),
    "epochs": ("num_train_epochs", ""),
    "num_epochs": ("num_train_epochs", ""),
    "max_epochs": ("num_train_epochs", ""),
    "random_seed": ("seed", ""),
    "data_seed": ("seed", ""),
    "eval_strategy": ("eval_steps", _STEPS),
    "evaluation_strategy": ("eval_steps", _STEPS),
    "save_strategy": ("save_steps", _STEPS),
    "logging_strategy": ("logging_steps", "a number of steps, or below 1 a share of the run"),
    "metric_for_best_model": ("eval_metric", ""),
    "load_best_model_at_end": ("eval_metric", "what it finds best is kept in `best` in any case"),
    "compute_metrics": ("eval_metric", ""),
    "early_stopping_steps": ("early_stopping_patience", ""),
    "overwrite_output_dir": ("overwrite", ""),
    "resume_from_checkpoint": ("resume: true", ""),
    "callbacks": ("reporters", "a keyword of lowrank.train in Python; a file names reporters in report_to"),
}
"""Theirs -> ours, by its path from the top of the file or of an entry of `jobs`, and a word about it."""

PEER_OPTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "GenerationConfig": {
        "max_tokens": ("max_new_tokens", ""),
        "max_length": ("max_new_tokens", "the question does not count"),
        "max_completion_tokens": ("max_new_tokens", ""),
        "do_sample": ("temperature", "0 takes the likeliest token, above it tokens are drawn"),
        "stop_strings": ("stop", ""),
        "stop_sequences": ("stop", ""),
        "top_logprobs": ("logprobs", ""),
        "repeat_penalty": ("repetition_penalty", ""),
        "response_format": ("json_schema", ""),
        "guided_json": ("json_schema", ""),
        "guided_grammar": ("grammar", ""),
    },
    "evaluate": {
        "max_tokens": ("max_new_tokens", ""),
        "dataset": ("data", ""),
        "eval_dataset": ("data", ""),
        "num_samples": ("max_samples", ""),
        "limit": ("max_samples", ""),
        "compute_metrics": ("metrics", ""),
    },
    "load": {
        "base_model": ("base", ""),
        "trust_remote_code": ("allow_code", ""),
        "torch_compile": ("compile", ""),
    },
    "serve": {
        "api_key": ("token", ""),
        "lora_modules": ("adapters", ""),
        "base_model": ("base", ""),
        "trust_remote_code": ("allow_code", ""),
        "max_model_len": ("kv_cache_tokens", "the tokens of all answers in progress"),
    },
}
"""By a function or a class of settings: theirs -> ours, and a word about it."""


def root_of(key: str) -> str | None:
    """The group or setting at the top in which the peers' `key` is here; None if it is no name of theirs alone."""
    found = PEER_NAMES.get(plain_name(key))
    return None if found is None else found[0].partition(":")[0].partition(".")[0]


def called_here(key: str, place: str = "") -> str | None:
    """`"; it is called 'adapter.rank' here"`, with what is to be known about it, for the peers' `key`. `place`: what
    stands behind the name."""
    return _sentence(PEER_NAMES.get(plain_name(key)), place)


def called_in_group(key: str, known: Collection[str], owner: str = "") -> str | None:
    """The same for a `key` of a function's keywords or of a group of settings by itself, which has the settings
    `known`; `owner` is the name of the function or of the group's class."""
    found = PEER_OPTIONS.get(owner, {}).get(plain_name(key))
    if found is None and (general := PEER_NAMES.get(plain_name(key))) is not None:
        path, colon, value = general[0].partition(":")
        name = path.rpartition(".")[2]
        found = (f"{name}{colon}{value}", general[1]) if name in known else None
    return _sentence(found)


def _sentence(found: tuple[str, str] | None, place: str = "") -> str | None:
    if found is None:
        return None
    name, about = found
    return f"; it is called {name!r} here{place}{f': {about}' if about else ''}"

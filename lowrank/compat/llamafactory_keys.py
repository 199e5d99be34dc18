"""Every key of a LLaMA-Factory (v0) training file, and what becomes of it.

    HONOURED    the fields of `Keys`, with LLaMA-Factory's own defaults
    NO_EFFECT   keys that are read and set aside, with the reason
    REFUSED     keys that would change what is learned in a way that is not built yet

docs/llamafactory.md is written from these tables. Defaults are those of LLaMA-Factory 0.9 and of the
transformers `TrainingArguments` it inherits, since a file relies on what it leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from lowrank.settings import NonNegative, Positive, Settings


class Keys(Settings):
    """The honoured keys. The docstring under a key is where it goes."""

    model_name_or_path: str
    """`model.path`"""
    model_revision: str = "main"
    """`model.revision`"""
    trust_remote_code: bool = False
    """`model.trust_remote_code`"""
    adapter_name_or_path: tuple[str, ...] = ()
    """`adapter.path`; one adapter, on which training goes on"""
    stage: str = "sft"
    """`objective.type`: `sft`, `pretrain` for `pt`, `dpo` (or what `pref_loss` names), `kto`, `reward` for `rm`,
    `ppo`"""
    ppo_epochs: int = Field(default=4, gt=0)
    """`objective.num_ppo_epochs`"""
    ppo_score_norm: bool = False
    """`objective.score_norm`; over the answers of a step here, over all so far there"""
    ppo_whiten_rewards: bool = False
    """`objective.whiten_rewards`"""
    reward_model: str | None = None
    """`objective.reward_model`: an adapter that was trained here with objective `reward`"""
    reward_model_type: str = "lora"
    """only `lora`: the judge is an adapter on the same base"""
    pref_loss: str = "sigmoid"
    """`objective.loss_type`: sigmoid, hinge or ipo; `orpo` and `simpo` are `objective.type`"""
    pref_beta: float = Field(default=0.1, gt=0)
    """`objective.beta`"""
    pref_ftx: float = Field(default=0.0, ge=0)
    """`objective.pref_ftx`, of dpo and kto; a mean over tokens here, over answers there"""
    dpo_label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """`objective.label_smoothing`"""
    simpo_gamma: float = Field(default=0.5, ge=0)
    """`objective.gamma`"""
    kto_chosen_weight: float = Field(default=1.0, ge=0)
    """`objective.desirable_weight`"""
    kto_rejected_weight: float = Field(default=1.0, ge=0)
    """`objective.undesirable_weight`"""
    do_train: bool = False
    """must be true"""
    finetuning_type: str = "lora"
    """`tuning`: `adapter` for `lora` and `oft` (`adapter.type: oft`), `full`, or `freeze`"""
    freeze_trainable_layers: int = 2
    """`freeze.trainable_layers`"""
    freeze_trainable_modules: tuple[str, ...] = ("all",)
    """`freeze.trainable_modules`"""
    freeze_extra_modules: tuple[str, ...] = ()
    """`freeze.extra_modules`"""
    use_llama_pro: bool = False
    """`freeze.spread`, on a model that `lowrank expand` wrote"""
    lora_rank: Positive = 8
    """`adapter.rank`"""
    lora_alpha: float | None = None
    """`adapter.alpha`; left out or 0: twice the rank"""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """`adapter.dropout`"""
    lora_target: tuple[str, ...] = ("all",)
    """`adapter.target_modules`; `all` is `all-linear`"""
    use_rslora: bool = False
    """`adapter.type: rslora`"""
    use_dora: bool = False
    """`adapter.type: dora`"""
    pissa_init: bool = False
    """`adapter.type: pissa`"""
    pissa_iter: int = Field(default=16, ge=-1)
    """`adapter.niter`; -1: exact"""
    loraplus_lr_ratio: float | None = None
    """`adapter.loraplus_lr_ratio`"""
    loraplus_lr_embedding: float = Field(default=1e-6, gt=0)
    """`adapter.loraplus_lr_embedding`"""
    oft_block_size: int = Field(default=32, ge=0)
    """`adapter.block_size`"""
    oft_target: tuple[str, ...] = ("all",)
    """`adapter.target_modules`; `all` is `all-linear`"""
    quantization_bit: int | None = None
    """`model.storage`: nf4 or fp4 for 4 bits, int8 for 8, or hqq of so many bits"""
    quantization_method: str = "bnb"
    """`model.storage.type: hqq` for `hqq`"""
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    """`model.storage.type`"""
    double_quantization: bool = True
    """`model.storage.double_quant`"""
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = None
    """`model.rope_scaling.type`; its factor is what `cutoff_len` needs, by the config.json in the model's folder"""
    add_tokens: tuple[str, ...] = ()
    """`adapter.trainable_token_indices`, on a base that `lowrank vocab` wrote with these tokens in it"""
    add_special_tokens: tuple[str, ...] = ()
    """as `add_tokens`"""
    new_special_tokens: tuple[str, ...] = ()
    """as `add_tokens`"""
    shift_attn: bool = False
    """`model.shift_attn`: groups of a quarter of `cutoff_len`, as there; here in every model that is packed, within
    each document"""
    additional_target: tuple[str, ...] = ()
    """`adapter.modules_to_save`"""
    pure_bf16: bool = False
    """`model.dtype: bfloat16`; adapters and optimiser state stay in 32 bit"""
    bf16: bool = False
    """`model.dtype: bfloat16`"""
    fp16: bool = False
    """`model.dtype: float16`"""
    disable_gradient_checkpointing: bool = False
    """`model.recompute: none`; left out: `full`, as in LLaMA-Factory"""
    use_cpu: bool = False
    """`model.device: cpu`"""
    no_cuda: bool = False
    """`model.device: cpu`"""
    dataset: tuple[str, ...] = ()
    """`data.train`, through `dataset_info.json`"""
    eval_dataset: tuple[str, ...] = ()
    """`data.eval`, through `dataset_info.json`"""
    dataset_dir: str = "data"
    """where `dataset_info.json` is: looked for from the current directory, then beside the file; `ONLINE`: dataset
    names are hub names"""
    template: str | None = None
    """`data.chat_template`, for the templates listed below; else the tokenizer's own is used, with a warning"""
    cutoff_len: Positive = 2048
    """`data.max_length`"""
    max_samples: Positive | None = None
    """`data.max_samples`"""
    val_size: float = Field(default=0.0, ge=0)
    """`data.validation_split`; a share below 1"""
    streaming: bool = False
    """`data.streaming`"""
    mix_strategy: str = "concat"
    """`data.mix`: `concat`, or `interleave` for `interleave_under`"""
    interleave_probs: tuple[float, ...] = ()
    """`weight` of each dataset"""
    packing: bool | None = None
    """`data.batch_tokens`: batch size x accumulation x `cutoff_len` tokens per step; documents never see each other;
    left out: on for `stage: pt`"""
    neat_packing: bool = False
    """as `packing`"""
    train_on_prompt: bool = False
    """`data.train_on_prompt`"""
    mask_history: bool = False
    """`data.mask_history`"""
    default_system: str | None = None
    """`data.default_system`"""
    enable_thinking: bool = True
    """`data.chat_template_kwargs.enable_thinking`, where it is set to false"""
    disable_shuffling: bool = False
    """`data.shuffle: false`"""
    per_device_train_batch_size: Positive = 8
    """times `gradient_accumulation_steps`: `data.batch_size`"""
    gradient_accumulation_steps: Positive = 1
    """times `per_device_train_batch_size`: `data.batch_size`"""
    learning_rate: float = Field(default=5e-5, gt=0)
    """`optimizer.learning_rate`"""
    weight_decay: float = Field(default=0.0, ge=0)
    """`optimizer.weight_decay`"""
    adam_beta1: float = 0.9
    """`optimizer.betas`"""
    adam_beta2: float = 0.999
    """`optimizer.betas`"""
    adam_epsilon: float = 1e-8
    """`optimizer.eps`"""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """`optimizer.max_grad_norm`; 0: never clip"""
    optim: str = "adamw_torch"
    """`optimizer.type`; see below"""
    use_galore: bool = False
    """`optimizer.type: galore`, or `galore_8bit` with an 8-bit `optim`; with tuning full or freeze"""
    galore_target: tuple[str, ...] = ("all",)
    """`optimizer.targets`"""
    galore_rank: Positive = 16
    """`optimizer.rank`"""
    galore_update_interval: Positive = 200
    """`optimizer.update_interval`"""
    galore_scale: float = Field(default=2.0, gt=0)
    """`optimizer.scale`"""
    galore_proj_type: Literal["std"] = "std"
    """the one there is"""
    use_apollo: bool = False
    """`optimizer.type: apollo`, with tuning full or freeze"""
    apollo_target: tuple[str, ...] = ("all",)
    """`optimizer.targets`"""
    apollo_rank: Positive = 16
    """`optimizer.rank`"""
    apollo_update_interval: Positive = 200
    """`optimizer.update_interval`"""
    apollo_scale: float = Field(default=32.0, gt=0)
    """`optimizer.scale`"""
    apollo_proj: Literal["random"] = "random"
    """the one there is"""
    apollo_proj_type: Literal["std"] = "std"
    """the one there is"""
    apollo_scale_type: Literal["channel", "tensor"] = "channel"
    """`optimizer.scale_type`"""
    use_badam: bool = False
    """`optimizer.type: badam`, with tuning full or freeze"""
    badam_start_block: int | None = None
    """`optimizer.start_block`"""
    badam_switch_mode: Literal["ascending", "descending", "random", "fixed"] = "ascending"
    """`optimizer.switch_mode`"""
    badam_switch_interval: Positive = 50
    """`optimizer.switch_interval`; the first block has as many steps as the others, there one less"""
    use_adam_mini: bool = False
    """`optimizer.type: adam_mini`"""
    use_muon: bool = False
    """`optimizer.type: muon`, torch's"""
    lr_scheduler_type: str = "linear"
    """`schedule.type`: linear, cosine, constant, constant_with_warmup, cosine_with_restarts, cosine_with_min_lr,
    inverse_sqrt"""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """`schedule.min_ratio` (`min_lr`, `min_lr_rate`), `schedule.num_cycles` (`num_cycles`)"""
    warmup_steps: float = Field(default=0, ge=0)
    """`schedule.warmup_steps`; below 1: `schedule.warmup_ratio`"""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """`schedule.warmup_ratio`"""
    num_train_epochs: float = Field(default=3.0, gt=0)
    """`num_train_epochs`"""
    max_steps: int = -1
    """`max_steps`; -1: by epochs"""
    seed: NonNegative = 42
    """`seed`"""
    neftune_noise_alpha: float | None = None
    """`neftune_noise_alpha`"""
    early_stopping_steps: Positive | None = None
    """`early_stopping_patience`"""
    metric_for_best_model: str = "eval_loss"
    """`eval_metric`: loss, or with `predict_with_generate` bleu-4, rouge-1, rouge-2 or rouge-l as LLaMA-Factory has
    them (`llamafactory_bleu4` ...), with or without `eval_` in front"""
    predict_with_generate: bool = False
    """`eval_metric`, together with a `metric_for_best_model` of generated answers"""
    max_new_tokens: Positive = 1024
    """`eval_max_new_tokens`, with `predict_with_generate`; of `stage: ppo` `objective.max_completion_length`"""
    temperature: float = Field(default=0.95, gt=0)
    """`objective.temperature`, of `stage: ppo`; else of generation, not of training"""
    top_p: float = Field(default=0.7, gt=0, le=1)
    """`objective.top_p`, of `stage: ppo`; else of generation, not of training"""
    top_k: NonNegative = 50
    """`objective.top_k`, of `stage: ppo`; else of generation, not of training"""
    output_dir: str
    """`output_dir`"""
    overwrite_output_dir: bool = False
    """`overwrite`"""
    resume_from_checkpoint: bool | str | None = None
    """`resume`; left out, without `overwrite_output_dir`: true, since LLaMA-Factory goes on with what is there"""
    logging_strategy: Literal["no", "steps", "epoch"] = "steps"
    """`logging_steps`"""
    logging_steps: float = Field(default=500, gt=0)
    """`logging_steps`"""
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    """`save_steps`; the best and last adapters are always kept"""
    save_steps: float = Field(default=500, gt=0)
    """`save_steps`"""
    save_total_limit: Positive | None = None
    """`save_total_limit`"""
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """`eval_steps`; `no`: only at the end"""
    evaluation_strategy: Literal["no", "steps", "epoch"] = "no"
    """the older name of `eval_strategy`"""
    eval_steps: float | None = Field(default=None, gt=0)
    """`eval_steps`; left out: as `logging_steps`"""
    report_to: tuple[str, ...] = ()
    """`report_to`"""
    use_swanlab: bool = False
    """`report_to: [swanlab]`"""

    @field_validator(
        "adapter_name_or_path",
        "lora_target",
        "oft_target",
        "galore_target",
        "apollo_target",
        "freeze_trainable_modules",
        "freeze_extra_modules",
        "additional_target",
        "add_tokens",
        "add_special_tokens",
        "new_special_tokens",
        "dataset",
        "eval_dataset",
        "report_to",
        mode="before",
    )
    @classmethod
    def _comma_separated(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("interleave_probs", mode="before")
    @classmethod
    def _comma_separated_numbers(cls, value: Any) -> Any:
        return tuple(str(value).split(",")) if isinstance(value, (str, int, float)) else value


@dataclass(frozen=True)
class Group:
    """Keys with one fate. `default` is LLaMA-Factory's own value, which never needs a word."""

    keys: tuple[str, ...]
    why: str
    default: Any = None
    speaks: bool = False
    """Whether another value than the default is worth a warning: it would have changed what is learned, what is
    written or what hardware is used."""


def _keys(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NO_EFFECT: Sequence[Group] = (
    Group(_keys("resize_vocab"), "a base that `lowrank vocab` wrote has rows for its tokens", False),
    Group(
        _keys(
            "overwrite_cache preprocessing_num_workers preprocessing_batch_size dataloader_num_workers "
            "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
            "dataloader_multiprocessing_context dataloader_in_order buffer_size remove_unused_columns label_names "
            "length_column_name ignore_pad_token_for_loss accelerator_config"
        ),
        "rows are read and tokenised in one pass before training, without a cache and without workers",
    ),
    Group(
        _keys(
            "flash_attn use_unsloth use_unsloth_gc enable_liger_kernel use_liger_kernel liger_kernel_config "
            "use_v1_kernels torch_compile torch_compile_backend torch_compile_mode torchdynamo low_cpu_mem_usage "
            "offload_folder use_reentrant_gc gradient_checkpointing_kwargs activation_checkpointing_kwargs "
            "torch_empty_cache_steps tf32 "
            "auto_find_batch_size use_cache upcast_lmhead_output fp16_opt_level half_precision_backend fp16_backend "
            "average_tokens_across_devices print_param_status jit_mode_eval use_ipex use_mps_device"
        ),
        "how the computation is carried out is decided here; the result does not depend on it",
    ),
    Group(
        _keys("gradient_checkpointing activation_checkpointing"),
        "LLaMA-Factory overrides it too; `disable_gradient_checkpointing` decides",
    ),
    Group(
        _keys("plot_loss include_num_input_tokens_seen include_effective_tokens_per_second include_tokens_per_second"),
        "always done: `loss.png`, token counts and tokens per second are part of every run",
    ),
    Group(
        _keys(
            "logging_first_step logging_nan_inf_filter logging_dir log_level log_level_replica log_on_each_node "
            "disable_tqdm skip_memory_metrics debug"
        ),
        "what is shown and logged is decided here",
    ),
    Group(
        _keys(
            "ddp_timeout ddp_backend ddp_bucket_cap_mb ddp_find_unused_parameters ddp_broadcast_buffers "
            "ddp_static_graph local_rank dispatch_batches split_batches ray_scope tpu_num_cores tpu_metrics_debug "
            "mp_parameters xpu_backend ray_run_name ray_storage_path ray_storage_filesystem resources_per_worker "
            "placement_strategy ray_init_kwargs"
        ),
        "there is one process",
    ),
    Group(
        _keys("deepspeed fsdp fsdp_config parallelism_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap"),
        "one process on one device; on n devices LLaMA-Factory's step held n times as many samples, so multiply "
        "gradient_accumulation_steps by n to keep it",
        speaks=True,
    ),
    Group(_keys("ray_num_workers"), "there is one process; multiply gradient_accumulation_steps instead", 1, True),
    Group(
        _keys(
            "per_device_eval_batch_size per_gpu_eval_batch_size eval_accumulation_steps prediction_loss_only "
            "eval_do_concat_batches eval_use_gather_object batch_eval_metrics include_for_metrics "
            "include_inputs_for_metrics bf16_full_eval fp16_full_eval do_eval"
        ),
        "held-out loss is computed over packed rows, `micro_batch_tokens` at a time, and always at the end",
    ),
    Group(
        _keys("load_best_model_at_end"),
        "the best adapter is always kept as `<job>/best`, the last one as `<job>/last`",
    ),
    Group(_keys("greater_is_better"), "of the held-out loss lower is better, of all other metrics higher"),
    Group(_keys("pissa_convert"), "what is saved is a LoRA on the unchanged base already", False),
    Group(_keys("save_only_model"), "a checkpoint always holds what is needed to go on", False),
    Group(_keys("save_safetensors"), "adapters are always safetensors", True),
    Group(
        _keys(
            "save_on_each_node restore_callback_states_from_checkpoint enable_jit_checkpoint past_index "
            "full_determinism group_by_length"
        ),
        "checkpoints and order are exact without it",
    ),
    Group(_keys("ignore_data_skip"), "a resumed run always goes on with the next row", False, True),
    Group(_keys("eval_delay"), "evaluation starts at the first multiple of eval_steps", 0, True),
    Group(_keys("eval_on_start"), "the first evaluation is at the first multiple of eval_steps", False, True),
    Group(_keys("eval_on_each_dataset"), "held-out datasets are evaluated together", False, True),
    Group(_keys("compute_accuracy"), "held-out loss is what is measured", False, True),
    Group(_keys("dataloader_drop_last"), "the last, smaller batch of an epoch is trained on too", False, True),
    Group(_keys("data_seed"), "`seed` decides the order of the rows as well", None, True),
    Group(
        _keys("train_sampling_strategy"),
        "rows come in random order; set disable_shuffling to keep them",
        "random",
        True,
    ),
    Group(_keys("upcast_layernorm"), "norms keep the dtype of the base", False, True),
    Group(_keys("use_fast_tokenizer"), "tokenizers are always the fast ones", True, True),
    Group(_keys("run_name"), "a run is called after its output_dir", None, True),
    Group(_keys("cache_dir"), "set the environment variable HF_HOME instead", None, True),
    Group(_keys("hf_hub_token hub_token"), "log in with `hf auth login` instead", None, True),
    Group(_keys("ms_hub_token om_hub_token"), "models and datasets come from the Hugging Face hub or from disk"),
    Group(_keys("swanlab_project swanlab_workspace swanlab_run_name swanlab_logdir"), "names come from output_dir"),
    Group(_keys("swanlab_mode"), "set the environment variable SWANLAB_MODE instead", "cloud", True),
    Group(_keys("swanlab_api_key"), "log in with `swanlab login` instead", None, True),
    Group(_keys("swanlab_lark_webhook_url swanlab_lark_secret"), "no messages are sent", None, True),
    Group(
        _keys(
            "hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision project trackio_space_id "
            "trackio_bucket_id trackio_static_space_id push_to_hub_model_id push_to_hub_organization push_to_hub_token"
        ),
        "belongs to an upload, which `push_to_hub` would ask for",
    ),
    Group(
        _keys(
            "media_dir image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels "
            "video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate freeze_vision_tower "
            "freeze_multi_modal_projector freeze_language_model"
        ),
        "belongs to images, video and audio; datasets that have them are refused",
    ),
    Group(
        _keys("quantization_device_map fp8_backend fp8_enable_fsdp_float8_all_gather"),
        "belongs to quantization, which `quantization_bit` or `fp8` would ask for",
    ),
    Group(
        _keys(
            "oft_rank badam_update_ratio badam_mask_mode badam_verbose asft_alpha eaft_alpha init_special_tokens "
            "kt_optimize_rule cpu_infer chunk_size mode kt_maxlen kt_use_cuda_graph kt_mode kt_force_think "
            "optim_target_modules"
        ),
        "belongs to a method that another key would ask for",
    ),
    Group(
        _keys("ref_model_quantization_bit reward_model_adapters reward_model_quantization_bit"),
        "belongs to the stages rm, ppo, dpo and kto",
    ),
    Group(
        _keys(
            "infer_backend infer_dtype use_kv_cache do_sample num_beams max_length "
            "repetition_penalty length_penalty skip_special_tokens eval_num_beams generation_max_length "
            "generation_num_beams generation_config sortish_sampler vllm_maxlen vllm_gpu_util vllm_enforce_eager "
            "vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config "
            "sglang_lora_backend"
        ),
        "belongs to generation, not to training",
    ),
    Group(
        _keys(
            "export_dir export_size export_device export_quantization_bit export_quantization_dataset "
            "export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id"
        ),
        "belongs to export, not to training",
    ),
)

REFUSED: Sequence[Group] = (
    Group(
        _keys("ppo_target"),
        "the weight of the KL cost does not move; remove it and set objective.kl_coef in the native form (0.2 here, "
        "where LLaMA-Factory begins)",
        6.0,
    ),
    Group(
        _keys("ppo_buffer_size"),
        "every optimiser step of an epoch is on all answers; remove it and multiply gradient_accumulation_steps by it",
        1,
    ),
    Group(
        _keys("ref_model ref_model_adapters"),
        "the reference is the base itself, without any adapter; remove it",
        None,
    ),
    Group(_keys("pref_bco_weight"), "there is no BCO term; remove it", 0.0),
    Group(_keys("ld_alpha"), "long answers are not weighed down; remove it", None),
    Group(_keys("fp8"), "there is no FP8 training; remove it and set bf16", False),
    Group(_keys("module_dropout"), "OFT's blocks are not dropped; remove it", 0.0),
    Group(
        _keys("galore_layerwise apollo_layerwise"),
        "updates inside the backward pass could be neither clipped nor guarded; remove it",
        False,
    ),
    Group(_keys("apollo_scale_front"), "the scale comes after the limit of growth; remove it", False),
    Group(
        _keys("create_new_adapter"),
        "it would merge the given adapter into the base first; merge it yourself, or remove the key to go on training "
        "the given adapter",
        False,
    ),
    Group(_keys("badam_mode"), "only `layer` is there, not parts of matrices; remove it", "layer"),
    Group(_keys("use_dft_loss use_asft_loss use_eaft_loss"), "remove it to train with the plain token loss", False),
    Group(
        _keys("mixture_of_depths"),
        "no server, no export and no plain transformers runs a model with such routers "
        "(docs/decisions/0011-no-mixture-of-depths.md); remove it",
        False,
    ),
    Group(_keys("train_from_scratch"), "the base's weights are always loaded; remove it", False),
    Group(_keys("use_mca use_kt use_hyper_parallel use_megatron_bridge"), "there is one back end; remove it", False),
    Group(
        _keys("new_special_tokens_config"),
        "name the tokens themselves in add_special_tokens, on a base that `lowrank vocab` wrote with them in it",
        None,
    ),
    Group(_keys("split_special_tokens"), "special tokens are never split; remove it", False),
    Group(_keys("moe_aux_loss_coef"), "the router's auxiliary loss is not trained; remove it", None),
    Group(_keys("tool_format"), "tools are rendered by the chat template; give data.chat_template=FILE.jinja", None),
    Group(_keys("tokenized_path"), "rows are tokenised at the start; remove it and name the dataset", None),
    Group(
        _keys("do_predict"),
        "training does not predict; remove it, and measure the result with `lowrank predict`",
        False,
    ),
    Group(_keys("label_smoothing_factor"), "the loss is not smoothed; remove it", 0.0),
    Group(_keys("optim_args"), "name the optimiser's settings themselves (adam_beta1 ...), and remove it", None),
    Group(_keys("push_to_hub"), "nothing is uploaded; remove it, and upload output_dir with `hf upload`", False),
    Group(_keys("per_gpu_train_batch_size"), "an old name; use per_device_train_batch_size", None),
)


def find(groups: Sequence[Group], key: str) -> Group | None:
    """The group `key` is in."""
    return next((group for group in groups if key in group.keys), None)


def known() -> list[str]:
    """Every key there is."""
    others = [key for group in (*NO_EFFECT, *REFUSED) for key in group.keys]
    return [*Keys.model_fields, *others]


def is_default(group: Group, value: Any) -> bool:
    """Whether `value` asks for nothing: LLaMA-Factory's own default, nothing, or (where that is the default) false."""
    if value is None or value == group.default or str(value).lower() == str(group.default).lower():
        return True
    off = (None, False, 0.0)
    return group.default in off and (value in off or str(value).lower() in ("no", "off", "none", "null", ""))

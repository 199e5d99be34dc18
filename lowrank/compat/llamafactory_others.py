"""The keys of a LLaMA-Factory (v0) training file that are not honoured, and why.

NO_EFFECT   keys that are read and set aside, with the reason
REFUSED     keys that would change what is learned in a way that is not built
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.compat.llamafactory_keys import Keys


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
    Group(_keys("apollo_scale_front"), "the scale comes after the limit of growth; remove it", False),
    Group(
        _keys("create_new_adapter"),
        "it would merge the given adapter into the base first; merge it yourself, or remove the key to go on training "
        "the given adapter",
        False,
    ),
    Group(_keys("badam_mode"), "only `layer` is there, not parts of matrices; remove it", "layer"),
    Group(_keys("use_dft_loss use_asft_loss use_eaft_loss"), "remove it to train with the plain token loss", False),
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

"""The keys of a LLaMA-Factory (v0) training file that are not honored, and why.

NO_EFFECT   keys that are read and set aside, with the reason
REFUSED     keys that would change what is learned in a way that is not built
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.compat.llamafactory.keys import Keys


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
        "rows are read and tokenized in one pass before training, without a cache and without workers",
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
            "placement_strategy ray_init_kwargs data_shared_file_system master_addr master_port"
        ),
        "how processes talk to one another is decided here; `devices` says how many there are",
    ),
    Group(
        _keys("parallelism_config"),
        "`devices` says how many compute, and base: sharded that they hold the base between them",
        speaks=True,
    ),
    Group(
        _keys("fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap"),
        "a base in parts is cut by decoder layer",
    ),
    Group(
        _keys("ray_num_workers"),
        "Ray starts no processes here; call lowrank.train in train_loop_per_worker (docs/distributed.md), and multiply "
        "gradient_accumulation_steps by the workers",
        1,
        True,
    ),
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
            "full_determinism"
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
    Group(_keys("group_by_length"), "rows come in random order, and none is padded to another's length", False, True),
    Group(_keys("upcast_layernorm"), "norms keep the dtype of the base", False, True),
    Group(_keys("use_fast_tokenizer"), "tokenizers are always the fast ones", True, True),
    Group(_keys("run_name"), "a run is called after its output_dir", None, True),
    Group(_keys("cache_dir"), "set the environment variable HF_HOME instead", None, True),
    Group(
        _keys("hf_hub_token hub_token push_to_hub_token"),
        "log in with `hf auth login` instead; for an upload, set the environment variable HF_TOKEN",
        None,
        True,
    ),
    Group(_keys("ms_hub_token"), "log in with `modelscope login` instead, and set USE_MODELSCOPE_HUB=1", None, True),
    Group(_keys("om_hub_token"), "Modelers' hub is not read: models come from Hugging Face, ModelScope or from disk"),
    Group(_keys("swanlab_project"), "the project at SwanLab is called lowrank", "llamafactory", True),
    Group(
        _keys("swanlab_workspace swanlab_run_name swanlab_logdir"),
        "the experiment is called after output_dir",
        None,
        True,
    ),
    Group(_keys("swanlab_mode"), "set the environment variable SWANLAB_MODE instead", "cloud", True),
    Group(_keys("swanlab_api_key"), "log in with `swanlab login` instead", None, True),
    Group(_keys("swanlab_lark_webhook_url swanlab_lark_secret"), "no messages are sent", None, True),
    Group(
        _keys(
            "hub_always_push project trackio_space_id trackio_bucket_id trackio_static_space_id push_to_hub_model_id "
            "push_to_hub_organization"
        ),
        "what is trained is uploaded once, after training, to hub_model_id, where `push_to_hub` asks for it",
    ),
    Group(
        _keys("hub_strategy"),
        "what is trained is uploaded once, after training; checkpoints are not",
        "every_save",
        True,
    ),
    Group(_keys("hub_private_repo"), "a new repository is private; its settings on the hub make it public", True, True),
    Group(_keys("hub_revision"), "an upload is a commit on the main branch", None, True),
    Group(
        _keys("use_audio_in_video"),
        "the sound of a video is not played; give it as a sound of its own",
        False,
        True,
    ),
    Group(
        _keys("audio_sampling_rate"),
        "the model's own feature extractor says at which rate it hears, and sounds are brought to that",
    ),
    Group(
        _keys("quantization_device_map fp8_backend fp8_enable_fsdp_float8_all_gather"),
        "belongs to quantization, which `quantization_bit` or `fp8` would ask for",
    ),
    Group(
        _keys(
            "badam_update_ratio badam_mask_mode badam_verbose init_special_tokens "
            "kt_optimize_rule cpu_infer chunk_size mode kt_maxlen kt_use_cuda_graph kt_mode kt_force_think "
            "optim_target_modules"
        ),
        "belongs to a method that another key would ask for",
    ),
    Group(
        _keys("ref_model_quantization_bit reward_model_quantization_bit"),
        "the model that is compared with, or judges, is not quantized on its own",
        None,
        True,
    ),
    Group(
        _keys("reward_model_adapters"),
        "belongs to a reward model of type full; `reward_model` names the adapter that judges",
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
    Group(
        _keys(
            "kt_cpu_activation kt_weight_path kt_non_expert_weight_path kt_expert_checkpoint_path "
            "kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size kt_config"
        ),
        "belongs to KTransformers, which `use_kt` would ask for",
    ),
    Group(
        _keys("hyper_parallel_args hyper_parallel_cp_size"),
        "belongs to HyperParallel, which `use_hyper_parallel` would ask for",
    ),
    Group(
        _keys(
            "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size "
            "context_parallel_size virtual_pipeline_model_parallel_size sequence_parallel "
            "recompute_granularity recompute_method recompute_num_layers "
            "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split "
            "bias_activation_fusion apply_rope_fusion masked_softmax_fusion "
            "cross_entropy_loss_fusion moe_grouped_gemm moe_token_dispatcher_type "
            "calculate_per_token_loss use_distributed_optimizer overlap_param_gather "
            "overlap_grad_reduce use_packed_sequences mixed_precision megatron_pretrained_checkpoint "
            "export_hf_on_finish extra_config"
        ),
        "belongs to Megatron, which `use_megatron_bridge` would ask for",
    ),
    Group(
        _keys("enable_torch_profiler"),
        "nothing is profiled; tokens per second and memory are part of every run",
        False,
        True,
    ),
    Group(
        _keys(
            "profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps "
            "profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack "
            "profile_modules"
        ),
        "belongs to a profile, which `enable_torch_profiler` would ask for",
    ),
    Group(
        _keys("task task_dir batch_size lang n_shot save_dir download_mode"),
        "belongs to evaluation: `lowrank eval FILE`",
    ),
)

REFUSED: Sequence[Group] = (
    Group(
        _keys("image_do_pan_and_scan crop_to_patches"),
        "the model's own processor decides how a picture is cut; remove it, and set it in the model's "
        "preprocessor_config.json (do_pan_and_scan, crop_to_patches)",
        False,
    ),
    Group(
        _keys("oft_rank"), "blocks are given by their width, not by their number; remove it and set oft_block_size", 0
    ),
    Group(
        _keys("adapter_folder"),
        "name the adapter's own folder in adapter_name_or_path, as adapter_name_or_path: PATH/FOLDER",
        None,
    ),
    Group(
        _keys("ppo_target"),
        "the weight of the KL cost does not move; remove it and set objective.kl_coef in the native form (0.2 here, "
        "where LLaMA-Factory begins)",
        6.0,
    ),
    Group(
        _keys("ppo_buffer_size"),
        "every optimizer step of an epoch is on all answers; remove it and multiply gradient_accumulation_steps by it",
        1,
    ),
    Group(_keys("fp8"), "there is no FP8 training; remove it and set bf16", False),
    Group(_keys("module_dropout"), "OFT's blocks are not dropped; remove it", 0.0),
    Group(_keys("apollo_scale_front"), "the scale comes after the limit of growth; remove it", False),
    Group(_keys("badam_mode"), "only `layer` is there, not parts of matrices; remove it", "layer"),
    Group(_keys("use_mca use_kt use_hyper_parallel use_megatron_bridge"), "there is one back end; remove it", False),
    Group(
        _keys("new_special_tokens_config"),
        "name the tokens themselves in add_special_tokens, on a base that `lowrank vocab` wrote with them in it",
        None,
    ),
    Group(_keys("tool_format"), "tools are rendered by the chat template; give data.chat_template=FILE.jinja", None),
    Group(_keys("optim_args"), "name the optimizer's settings themselves (adam_beta1 ...), and remove it", None),
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

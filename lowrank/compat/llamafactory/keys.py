"""The keys of a LLaMA-Factory (v0) training file that are honored; the others are in other_keys.py.

docs/llamafactory.md is written from both. Defaults are those of LLaMA-Factory 0.9 and of the
transformers `TrainingArguments` it inherits, since a file relies on what it leaves out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from lowrank.media.limits import MAX_PIXELS, MIN_PIXELS, VIDEO_FPS, VIDEO_MAX_PIXELS, VIDEO_MAXLEN, VIDEO_MIN_PIXELS
from lowrank.settings import NonNegative, Positive, Settings


def _by_spaces(value: Any) -> Any:
    return tuple(value.split()) if isinstance(value, str) else value


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Listed = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""Names in a list, or in one text with commas."""


class Keys(Settings):
    """The honored keys. The docstring under a key is where it goes."""

    model_name_or_path: str
    """`model.path`"""
    model_revision: str = "main"
    """`model.revision`"""
    trust_remote_code: bool = False
    """`model.trust_remote_code`"""
    adapter_name_or_path: Listed = ()
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
    use_dft_loss: bool = False
    """`objective.loss_type: dft`"""
    use_asft_loss: bool = False
    """`objective.loss_type: asft`"""
    asft_alpha: float = Field(default=0.1, ge=0)
    """`objective.asft_alpha`"""
    use_eaft_loss: bool = False
    """`objective.loss_type: eaft`"""
    eaft_alpha: float = Field(default=1.0, ge=0)
    """`objective.eaft_alpha`"""
    label_smoothing_factor: float = Field(default=0.0, ge=0, lt=1)
    """`objective.label_smoothing`, of sft and pt"""
    ref_model: str | None = None
    """`objective.reference_model`, of dpo and kto"""
    ref_model_adapters: str | None = None
    """`objective.reference_model`: this adapter, on the base that its own file names"""
    pref_bco_weight: float = Field(default=0.0, ge=0)
    """`objective.bco_weight`; the mean it compares with is over steps, there over forward passes"""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """`objective.ld_alpha`"""
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
    """must be true, to train"""
    do_predict: bool = False
    """`lowrank train FILE` answers the questions of `eval_dataset` after training, into `output_dir/predict`; without
    do_train it is `lowrank predict FILE`"""
    push_to_hub: bool = False
    """`lowrank train FILE` uploads the result afterwards, as `lowrank export --push` does"""
    hub_model_id: str | None = None
    """where `push_to_hub` uploads it: owner/name"""
    finetuning_type: str = "lora"
    """`tuning`: `adapter` for `lora` and `oft` (`adapter.type: oft`), `full`, or `freeze`"""
    freeze_trainable_layers: int = 2
    """`freeze.trainable_layers`"""
    freeze_trainable_modules: Listed = ("all",)
    """`freeze.trainable_modules`"""
    freeze_extra_modules: Listed = ()
    """`freeze.extra_modules`"""
    use_llama_pro: bool = False
    """`freeze.spread`, on a model that `lowrank expand` wrote"""
    lora_rank: Positive = 8
    """`adapter.rank`"""
    lora_alpha: float | None = None
    """`adapter.alpha`; left out or 0: twice the rank"""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """`adapter.dropout`"""
    lora_target: Listed = ("all",)
    """`adapter.target_modules`; `all` is `all-linear`"""
    use_rslora: bool = False
    """`adapter.type: rslora`; with `use_dora` `rsdora`"""
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
    freeze_vision_tower: bool = True
    """`adapter.freeze_vision_tower`"""
    freeze_multi_modal_projector: bool = True
    """`adapter.freeze_multi_modal_projector`"""
    freeze_language_model: bool = False
    """`adapter.freeze_language_model`"""
    image_max_pixels: Positive = MAX_PIXELS
    """`model.image_max_pixels`"""
    image_min_pixels: Positive = MIN_PIXELS
    """`model.image_min_pixels`"""
    video_max_pixels: Positive = VIDEO_MAX_PIXELS
    """`model.video_max_pixels`"""
    video_min_pixels: Positive = VIDEO_MIN_PIXELS
    """`model.video_min_pixels`"""
    video_fps: float = Field(default=VIDEO_FPS, gt=0)
    """`model.video_fps`"""
    video_maxlen: Positive = VIDEO_MAXLEN
    """`model.video_maxlen`"""
    media_dir: str | None = None
    """`data.train[].media_dir`, of datasets with images, videos or audios; left out: `dataset_dir`"""
    oft_block_size: int = Field(default=32, ge=0)
    """`adapter.block_size`"""
    oft_target: Listed = ("all",)
    """`adapter.target_modules`; `all` is `all-linear`"""
    moe_aux_loss_coef: float | None = Field(default=None, ge=0)
    """`model.router_aux_loss_coef`"""
    train_from_scratch: bool = False
    """`model.random_init`, from `seed`; with finetuning_type: full"""
    create_new_adapter: bool = False
    """`lowrank train FILE` merges `adapter_name_or_path` into a copy of the base beside output_dir first, with `lowrank
    export`, and trains a new adapter on that"""
    quantization_bit: int | None = None
    """`model.storage`: nf4 or fp4 for 4 bits, int8 for 8, or hqq of so many bits"""
    quantization_method: str = "bnb"
    """`model.storage.type: hqq` for `hqq`, `eetq` for `eetq`: its arithmetic, without its kernels"""
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    """`model.storage.type`"""
    double_quantization: bool = True
    """`model.storage.double_quant`"""
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = None
    """`model.rope_scaling.type`; its factor is what `cutoff_len` needs, by the config.json in the model's folder"""
    add_tokens: Listed = ()
    """`adapter.trainable_token_indices`, on a base that `lowrank vocab` wrote with these tokens in it"""
    add_special_tokens: Listed = ()
    """as `add_tokens`"""
    new_special_tokens: Listed = ()
    """as `add_tokens`"""
    mixture_of_depths: Literal[False, "convert", "load"] = False
    """`model.layer_wrapper: mixture_of_depths` for convert, nothing for load; what comes of it runs here alone"""
    shift_attn: bool = False
    """`model.shift_attn`: groups of a quarter of `cutoff_len`, as there; here in every model that is packed, within
    each document"""
    additional_target: Listed = ()
    """`adapter.modules_to_save`"""
    pure_bf16: bool = False
    """`model.dtype: bfloat16`; adapters and optimizer state stay in 32 bit"""
    bf16: bool = False
    """`model.dtype: bfloat16`"""
    fp16: bool = False
    """`model.dtype: float16`"""
    disable_gradient_checkpointing: bool = False
    """`model.activation_checkpointing: none`; left out: `full`, as in LLaMA-Factory"""
    use_cpu: bool = False
    """`model.device: cpu`"""
    no_cuda: bool = False
    """`model.device: cpu`"""
    dataset: Listed = ()
    """`data.train`, through `dataset_info.json`"""
    eval_dataset: Listed = ()
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
    """`data.validation_split`; a share, or from 1 on a number of rows, chosen by the seed"""
    streaming: bool = False
    """`data.streaming`"""
    mix_strategy: str = "concat"
    """`data.mix`: `concat`, `interleave` for `interleave_under`, `interleave_over`, `interleave_once`; by chance also
    without `interleave_probs`, where datasets take turns there"""
    interleave_probs: tuple[float, ...] = ()
    """`weight` of each dataset"""
    tokenized_path: str | None = None
    """`data.tokenized_path`, in the same layout, so that either program reads what the other wrote; not for kto. Where
    it is written, the datasets need not be here"""
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
    split_special_tokens: bool | None = None
    """`data.split_special_tokens`; left out, text in conversations is read as text, which LLaMA-Factory does only
    where it is true"""
    enable_thinking: bool = True
    """`data.chat_template_kwargs.enable_thinking`, where it is set to false"""
    preserve_thinking: bool = False
    """`data.chat_template_kwargs.preserve_thinking`, where it is true: for templates that read it"""
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
    galore_target: Listed = ("all",)
    """`optimizer.targets`"""
    galore_rank: Positive = 16
    """`optimizer.rank`"""
    galore_update_interval: Positive = 200
    """`optimizer.update_interval`"""
    galore_scale: float = Field(default=2.0, gt=0)
    """`optimizer.scale`"""
    galore_proj_type: Literal["std"] = "std"
    """the one there is"""
    galore_layerwise: bool = False
    """`optimizer.layerwise`, and nothing is clipped, as there"""
    use_apollo: bool = False
    """`optimizer.type: apollo`, with tuning full or freeze"""
    apollo_target: Listed = ("all",)
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
    apollo_layerwise: bool = False
    """`optimizer.layerwise`, and nothing is clipped, as there"""
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
    inverse_sqrt, polynomial, warmup_stable_decay"""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """`schedule.min_ratio` (`min_lr`, `min_lr_rate`), `schedule.num_cycles` (`num_cycles`), `schedule.power`,
    `schedule.num_stable_steps`, `schedule.num_decay_steps`, `schedule.decay_type`; `lr_end`, `min_lr_ratio`"""
    warmup_steps: float = Field(default=0, ge=0)
    """`schedule.warmup_steps`; below 1: `schedule.warmup_ratio`"""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """`schedule.warmup_ratio`"""
    num_train_epochs: float = Field(default=3.0, gt=0)
    """`num_train_epochs`"""
    max_steps: int = -1
    """`max_steps`; -1: by epochs"""
    deepspeed: str | dict[str, Any] | None = None
    """ZeRO stage 3 on several devices: `base: sharded` (`sharded_offload` with `offload_param`); stages 1 and 2 shard
    what a frozen base has not"""
    fsdp: Annotated[bool | tuple[str, ...], BeforeValidator(_by_spaces)] = False
    """`full_shard`, `hybrid_shard`, true, on several devices: `base: sharded` (`sharded_offload` with `offload`)"""
    fsdp_config: str | dict[str, Any] | None = None
    """as `fsdp`: `reshard_after_forward`, `sharding_strategy`, `offload_params`"""
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
    report_to: Listed = ()
    """`report_to`"""
    use_swanlab: bool = False
    """`report_to: [swanlab]`"""

    @field_validator("interleave_probs", mode="before")
    @classmethod
    def _comma_separated_numbers(cls, value: Any) -> Any:
        return tuple(str(value).split(",")) if isinstance(value, (str, int, float)) else value

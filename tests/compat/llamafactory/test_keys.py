"""What becomes of each key of a LLaMA-Factory file: a setting, an error that names it, or a warning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lowrank.compat.llamafactory.other_keys import known
from tests.compat.llamafactory.files import MINIMAL, problems, read, settings


@pytest.mark.parametrize(
    ("lines", "path", "value"),
    [
        ("lora_alpha: 32\n", "adapter.alpha", 32.0),
        ("lora_alpha: 0\n", "adapter.alpha", None),
        ("lora_dropout: 0.05\n", "adapter.dropout", 0.05),
        ("lora_target: q_proj, v_proj\n", "adapter.target_modules", ["q_proj", "v_proj"]),
        ("lora_target: [q_proj, v_proj]\n", "adapter.target_modules", ["q_proj", "v_proj"]),
        ("use_rslora: true\n", "adapter.type", "rslora"),
        ("additional_target: embed_tokens,lm_head\n", "adapter.modules_to_save", ["embed_tokens", "lm_head"]),
        ("add_special_tokens: <a>,<b>\nadd_tokens: c\n", "adapter.trainable_token_indices", ["c", "<a>", "<b>"]),
        ("add_tokens: c\nadditional_target: embed_tokens,lm_head\n", "adapter.trainable_token_indices", []),
        ("adapter_name_or_path: ./old\n", "adapter.path", "./old"),
        ("pure_bf16: true\n", "model.dtype", "bfloat16"),
        ("fp16: true\n", "model.dtype", "float16"),
        ("disable_gradient_checkpointing: true\n", "model.activation_checkpointing", "none"),
        ("use_cpu: true\n", "model.device", "cpu"),
        ("model_revision: v2\n", "model.revision", "v2"),
        ("neat_packing: true\n", "data.batch_tokens", 8 * 2048),
        ("packing: true\ncutoff_len: 100\ngradient_accumulation_steps: 2\n", "data.batch_tokens", 8 * 2 * 100),
        ("train_on_prompt: true\n", "data.train_on_prompt", True),
        ("mask_history: true\n", "data.mask_history", True),
        ("template: llama3\n", "data.chat_template", "llama3"),
        ("template: deepseek3\n", "data.chat_template", "deepseek"),
        ("default_system: You are kind.\n", "data.default_system", "You are kind."),
        ("enable_thinking: false\n", "data.chat_template_kwargs", {"enable_thinking": False}),
        ("disable_shuffling: true\n", "data.shuffle", False),
        ("streaming: true\nmax_steps: 7\n", "data.streaming", True),
        ("max_steps: 7\n", "max_steps", 7),
        ("adam_beta2: 0.95\n", "optimizer.betas", [0.9, 0.95]),
        ("max_grad_norm: 0\n", "optimizer.max_grad_norm", None),
        ("optim: sgd\n", "optimizer.type", "sgd"),
        ("optim: adamw_torch_fused\n", "optimizer.type", "adamw"),
        ("warmup_steps: 20\n", "schedule.warmup_steps", 20),
        ("warmup_steps: 0.05\n", "schedule.warmup_ratio", 0.05),
        ("neftune_noise_alpha: 5\n", "neftune_noise_alpha", 5.0),
        ("seed: 7\n", "seed", 7),
        ("save_strategy: epoch\nnum_train_epochs: 4\n", "save_steps", 0.25),
        ("save_strategy: no\n", "save_steps", None),
        ("save_steps: 0.2\n", "save_steps", 0.2),
        ("logging_steps: 5.0\n", "logging_steps", 5),
        ("eval_dataset: alpaca_en_demo\n", "eval_steps", None),
        ("eval_dataset: alpaca_en_demo\neval_strategy: steps\nlogging_steps: 25\n", "eval_steps", 25),
        ("val_size: 0.1\nevaluation_strategy: epoch\nnum_train_epochs: 2\n", "eval_steps", 0.5),
        ("val_size: 0.1\neval_strategy: steps\nearly_stopping_steps: 3\n", "early_stopping_patience", 3),
        ("report_to: [wandb, tensorboard]\n", "report_to", ["wandb", "tensorboard"]),
        ("use_swanlab: true\n", "report_to", ["swanlab"]),
        ("resume_from_checkpoint: true\noverwrite_output_dir: true\n", "resume", True),
        ("resume_from_checkpoint: false\n", "resume", False),
        ("per_device_train_batch_size: 1\ncutoff_len: 512\n", "micro_batch_tokens", 512),
        ("finetuning_type: full\n", "tuning", "full"),
        ("finetuning_type: freeze\nfreeze_trainable_layers: -1\n", "freeze.trainable_layers", -1),
        ("finetuning_type: freeze\nfreeze_trainable_modules: mlp,self_attn\n", "tuning", "freeze"),
        ("finetuning_type: oft\n", "adapter.type", "oft"),
        ("use_dora: true\n", "adapter.type", "dora"),
        ("pissa_init: true\npissa_iter: -1\n", "adapter.niter", 0),
        ("loraplus_lr_ratio: 16.0\n", "adapter.loraplus_lr_ratio", 16.0),
        ("quantization_bit: 4\n", "model.storage.type", "nf4"),
        ("quantization_bit: 4\ndouble_quantization: false\n", "model.storage.double_quant", False),
        ("quantization_bit: 3\nquantization_method: hqq\n", "model.storage.bits", 3),
        ("quantization_bit: 8\nquantization_method: eetq\n", "model.storage.type", "eetq"),
        ("quantization_bit: 8\n", "model.storage.type", "int8"),
        ("optim: paged_adamw_8bit\n", "optimizer.type", "paged_adamw_8bit"),
        ("optim: adafactor\n", "optimizer.type", "adafactor"),
        ("finetuning_type: full\nuse_galore: true\ngalore_rank: 128\n", "optimizer.rank", 128),
        ("finetuning_type: full\nuse_apollo: true\napollo_scale: 4.0\n", "optimizer.scale", 4.0),
        ("finetuning_type: full\nuse_muon: true\n", "optimizer.type", "muon"),
        ("finetuning_type: full\nmixture_of_depths: convert\n", "model.layer_wrapper.every", 2),
        ("finetuning_type: full\nmixture_of_depths: load\n", "model.layer_wrapper", None),
        ("finetuning_type: full\nuse_galore: true\ngalore_layerwise: true\n", "optimizer.layerwise", True),
        ("finetuning_type: full\nuse_apollo: true\napollo_layerwise: true\n", "optimizer.max_grad_norm", None),
    ],
)
def test_a_key_becomes(workplace: Path, lines: str, path: str, value: object) -> None:
    (workplace / "old").mkdir()
    found: Any = settings(read(workplace, MINIMAL + lines)[0])
    for key in path.split("."):
        found = found[key]
    assert found == value


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("lora_rnk: 8\n", "lora_rnk: unknown key; did you mean 'lora_rank'?"),
        ("lora_rank: big\n", "lora_rank: expected a whole number, got 'big'"),
        ("stage: ppo\n", "reward_model: required for stage: ppo"),
        ("stage: ppo\nreward_model: a\nreward_model_type: api\n", "reward_model_type: 'api' is not supported"),
        ("stage: ppo\nreward_model: a\nppo_target: 3.0\n", "ppo_target: 3.0 is not supported: the weight of the KL"),
        ("ppo_buffer_size: 2\n", "ppo_buffer_size: 2 is not supported: every optimizer step"),
        ("stage: sftt\n", "stage: 'sftt' is not trained; choose one of sft, pt, dpo, kto, rm, ppo; did you mean"),
        ("stage: dpo\n", "dataset 'identity': stage dpo needs preference pairs, and it is not marked ranking: true"),
        ("stage: kto\n", "dataset 'identity': stage kto needs rated answers, and columns.kto_tag is not given"),
        ("dataset: chats\nstage: dpo\npref_loss: kto_pair\n", "pref_loss: 'kto_pair' is not supported; use stage: kto"),
        (
            "dataset: chats\nstage: dpo\npref_loss: ipo\ndpo_label_smoothing: 0.1\n",
            "dpo_label_smoothing: only for pref_loss: sigmoid",
        ),
        (
            "dataset: chats\nstage: dpo\npref_loss: orpo\nref_model: other\n",
            "ref_model: stage dpo compares with no other model",
        ),
        ("finetuning_type: bone\n", "finetuning_type: 'bone' is not there; choose lora, oft, freeze, full"),
        ("use_dora: true\npissa_init: true\n", "use_dora and pissa_init: set only one"),
        ("quantization_bit: 5\n", "quantization_bit: bnb has 4, 8 bits, not 5"),
        ("quantization_bit: 8\nquantization_method: quanto\n", "quantization_method: 'quanto' is not there"),
        ("quantization_bit: 4\nquantization_method: eetq\n", "quantization_bit: eetq has 8 bits, not 4"),
        ("rope_scaling: yarn\n", "rope_scaling: how far "),
        ("badam_mode: ratio\n", "badam_mode: 'ratio' is not supported: only `layer` is there"),
        ("use_galore: true\noptim: adafactor\n", "optim: adafactor inside of use_galore is not there"),
        ("optim: rmsprop\n", "optim: 'rmsprop' is not supported"),
        ("lr_scheduler_type: reduce_lr_on_plateau\n", "lr_scheduler_type: 'reduce_lr_on_plateau' is not supported"),
        ("use_dft_loss: true\nuse_eaft_loss: true\n", "use_dft_loss and use_eaft_loss: set only one"),
        ("label_smoothing_factor: 0.1\nuse_dft_loss: true\n", "use_dft_loss and label_smoothing_factor: set only one"),
        ("ld_alpha: 0.5\n", "ld_alpha: only for stage: dpo with a reference"),
        ("train_from_scratch: true\n", "train_from_scratch: random weights are nothing to put an adapter on"),
        ("create_new_adapter: true\nadapter_name_or_path: a\n", "create_new_adapter: the given adapter is merged"),
        ("lr_scheduler_kwargs: {power: 2}\n", "lr_scheduler_kwargs: 'power' is not supported with linear"),
        ("report_to: neptune\n", "report_to: 'neptune' is not supported; choose from"),
        ("resume_from_checkpoint: out/checkpoint-5\n", "resume_from_checkpoint: 'out/checkpoint-5' may be another"),
        ("val_size: 1.5\n", "val_size: expected a share below 1, or a whole number of rows, got 1.5"),
        ("val_size: 0.1\neval_dataset: identity\n", "val_size and eval_dataset: set only one"),
        ("eval_strategy: steps\n", "eval_strategy: 'steps' needs held-out rows"),
        ("save_strategy: epoch\nmax_steps: 5\n", "save_strategy: 'epoch' is not supported together with max_steps"),
        ("logging_steps: 2.5\n", "logging_steps: expected a whole number, or a share below 1, got 2.5"),
        ("adapter_name_or_path: a,b\n", "adapter_name_or_path: training goes on with one adapter"),
        ("finetuning_type: full\nuse_rslora: true\n", "use_rslora: only for finetuning_type: lora"),
        ("mix_strategy: interleave\n", "mix_strategy: 'interleave' is not known; use concat, interleave_under"),
        ("mix_strategy: interleave_under\ninterleave_probs: 0.1,0.9\n", "interleave_probs: 2 numbers for 1 datasets"),
        ("interleave_probs: 0.5\n", "interleave_probs: only for mix_strategy"),
        ("dataset_dir: REMOTE:/a/b/c\n", "dataset_dir: /a/b/c cannot be downloaded from the hub"),
        ("bf16: true\nfp16: true\n", "bf16 and fp16: set only one"),
        ("metric_for_best_model: accuracy\n", "metric_for_best_model: 'accuracy' is not supported; choose loss"),
        (
            "metric_for_best_model: eval_rouge-l\n",
            "metric_for_best_model: 'eval_rouge-l' is of generated answers; set predict_with",
        ),
        ("stage: pt\n", "dataset 'identity': for stage pt, name the one column of text"),
        ("predict_with_generate: true\n", "predict_with_generate: training generates only for"),
        ("template: xverse\n", "template: 'xverse' is none of LLaMA-Factory's"),
        ("model: m\n", None),
        ("micro_batch_tokens: 64\n", "micro_batch_tokens: unknown key (a native key; give it on the command line)"),
    ],
)
def test_what_cannot_be_honored_is_an_error_that_names_it(workplace: Path, lines: str, problem: str | None) -> None:
    text = "".join(line + "\n" for line in MINIMAL.splitlines() if line.split(":")[0] != lines.split(":")[0]) + lines
    found = problems(workplace, text)
    if problem is None:  # a file with both kinds of keys is a native one, whose unknown keys are told
        assert (
            re.search(r"model_name_or_path: unknown key; (\d+ are known|did you mean)", "\n".join(found))
            or len(found) > 1
        )
    else:
        assert len(found) == 1
        assert found[0].startswith(problem)


def test_keys_of_pictures(workplace: Path) -> None:
    (workplace / "photos").mkdir()
    text = "model_name_or_path: lowrank/tiny\nstage: sft\ndo_train: true\nfinetuning_type: lora\ndataset: pictures\n"
    text += (
        "template: qwen2_vl\noutput_dir: out\nimage_max_pixels: 262144\nfreeze_vision_tower: false\nmedia_dir: photos\n"
    )
    config, _ = read(workplace, text)
    (job,) = config.jobs
    assert (config.model.image_max_pixels, config.model.image_min_pixels) == (262144, 32 * 32)
    assert job.adapter.parts == {"language_model", "vision_tower", "sound"}
    assert Path(str(job.data.train[0].media_dir)) == Path("photos")
    assert config.model.image_max_pixels == 262144
    (problem,) = problems(workplace, text, "image_do_pan_and_scan=true")
    assert "image_do_pan_and_scan: True is not supported" in problem
    (problem,) = problems(workplace, text, "finetuning_type=full")
    assert "freeze_vision_tower: with finetuning_type: full the language model alone is trained" in problem
    (problem,) = problems(workplace, text, "media_dir=nowhere")
    assert problem == "media_dir: there is no folder nowhere"


def test_keys_of_videos(workplace: Path) -> None:
    text = MINIMAL.replace("identity", "films") + "video_max_pixels: 16384\nvideo_fps: 1.0\nvideo_maxlen: 64\n"
    config, _ = read(workplace, text)
    assert (config.model.video_max_pixels, config.model.video_min_pixels) == (16384, 16 * 16)
    assert (config.model.video_fps, config.model.video_maxlen) == (1.0, 64)
    (source,) = config.jobs[0].data.train
    assert (source.columns["videos"], source.media_dir) == ("v", "data")
    _, notices = read(workplace, text + "use_audio_in_video: true\n")
    assert any("use_audio_in_video" in each and "give it as a sound of its own" in each for each in notices)


@pytest.mark.parametrize(
    ("lines", "warning"),
    [
        ("packing: true\n", "packing: packed documents never see each other here"),
        ("lr_scheduler_type: constant\nwarmup_ratio: 0.1\n", "warmup has no effect with lr_scheduler_type: constant"),
        ("warmup_ratio: 0.1\nwarmup_steps: 5\n", "warmup_ratio has no effect, since warmup_steps is set"),
        ("val_size: 0.1\neval_steps: 5\n", "eval_steps has no effect while eval_strategy is 'no'"),
        ("template: yi\n", "template: m/x is not on this machine yet, so 'yi' was not compared"),
        ("compute_accuracy: true\n", "compute_accuracy has no effect: held-out loss is what is measured"),
        ("hf_hub_token: hf_abc\n", "hf_hub_token has no effect: log in with"),
        ("dataloader_drop_last: true\n", "dataloader_drop_last has no effect"),
        ("use_swanlab: true\nswanlab_project: mine\n", "swanlab_project has no effect: the project at SwanLab is"),
        ("swanlab_run_name: first\n", "swanlab_run_name has no effect: the experiment is called after output_dir"),
        ("num_train_epochs: 2\nmax_steps: 4\n", None),
        ("flash_attn: fa2\nenable_liger_kernel: true\nplot_loss: true\noverwrite_cache: true\n", None),
        ("compute_accuracy: false\ncache_dir: null\npref_beta: 0.3\ntemperature: 0.1\n", None),
    ],
)
def test_warnings(workplace: Path, lines: str, warning: str | None) -> None:
    _, warnings = read(workplace, MINIMAL + lines)
    if warning is None:
        assert warnings == []
    else:
        assert len(warnings) == 1
        assert warnings[0].startswith(warning)
        assert "hf_abc" not in warnings[0]


def test_generated_answers_may_decide(workplace: Path) -> None:
    text = MINIMAL + "predict_with_generate: true\nmetric_for_best_model: eval_rouge-l\nval_size: 0.5\n"
    config, _ = read(workplace, text + "load_best_model_at_end: true\ngreater_is_better: true\nmax_new_tokens: 32\n")
    job = config.jobs[0]
    assert (job.eval_metric, job.eval_generate_samples, job.eval_max_new_tokens) == ("llamafactory_rougeL", None, 32)
    assert read(workplace, MINIMAL)[0].jobs[0].eval_metric == "loss"


def test_every_key_of_transformers_is_known() -> None:
    import transformers
    from transformers import Seq2SeqTrainingArguments

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version > (5, 23):
        pytest.skip(f"the table was made for transformers 5.23, this is {transformers.__version__}")
    assert sorted(set(Seq2SeqTrainingArguments.__dataclass_fields__) - set(known())) == []


def test_every_key_has_one_fate() -> None:
    names = known()
    assert len(names) == len(set(names))
    assert len(names) > 350

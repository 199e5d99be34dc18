"""The keys that LLaMA-Factory reads when nothing is trained, and how a file's are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from lowrank.compat.llamafactory.keys import Listed
from lowrank.compat.llamafactory.other_keys import known
from lowrank.errors import did_you_mean
from lowrank.setting_problems import error_lines
from lowrank.settings import NonNegative, Positive, Settings


class UseKeys(Settings):
    """What LLaMA-Factory reads when nothing is trained; keys of training are set aside there, too."""

    model_name_or_path: str
    """the base: `lowrank COMMAND MODEL`"""
    adapter_name_or_path: Listed = ()
    """`--adapter`; several are merged one after the other"""
    template: str | None = None
    """`--chat-template`"""
    default_system: str | None = None
    """`--system`"""
    enable_thinking: bool = True
    """false has no effect, which is said"""
    quantization_bit: int | None = None
    """refused: `lowrank quantize` writes a copy in so many bits"""
    infer_backend: Literal["huggingface", "vllm", "sglang", "ktransformers"] = "huggingface"
    """vllm: `--engine vllm` of serve; no effect elsewhere, which is said"""
    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """no effect, which is said: weights keep the dtype they were saved in"""
    do_sample: bool = True
    """false: temperature 0"""
    temperature: float = Field(default=0.95, ge=0)
    """`--temperature`"""
    top_p: float = Field(default=0.7, ge=0, le=1)
    """`--top-p`"""
    top_k: NonNegative = 50
    """`--top-k`"""
    max_new_tokens: Positive = 1024
    """`--max-new-tokens`"""
    num_beams: Positive = 1
    """no effect above 1, which is said"""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """`--repetition-penalty`"""
    skip_special_tokens: bool = True
    """false has no effect, which is said"""
    seed: NonNegative = 42
    """`--seed`"""
    stage: str = "sft"
    """only sft predicts"""
    do_train: bool = False
    """the file trains: `lowrank train`"""
    do_predict: bool = False
    """`lowrank predict`"""
    do_eval: bool = False
    """of training"""
    dataset: Listed = ()
    """of training"""
    eval_dataset: Listed = ()
    """`--data`"""
    dataset_dir: str = "data"
    """`--dataset-dir`"""
    val_size: float = Field(default=0.0, ge=0)
    """of training"""
    max_samples: Positive | None = None
    """`--max-samples`"""
    output_dir: str | None = None
    """`--output`"""
    finetuning_type: str = "lora"
    """of training"""
    load_best_model_at_end: bool = False
    """false: `predict --last` after training"""
    create_new_adapter: bool = False
    """of training: merged first"""
    push_to_hub: bool = False
    """after training: `lowrank export --push`"""
    hub_model_id: str | None = None
    """the name that `push_to_hub` takes"""
    export_dir: str | None = None
    """`lowrank export ... --output`"""
    export_size: Positive = 5
    """`max_shard_size`, in GB"""
    export_quantization_bit: Literal[2, 3, 4, 8] | None = None
    """`--to gptq`, `bits`"""
    export_quantization_dataset: str | None = None
    """`calibration`"""
    export_quantization_nsamples: Positive = 128
    """no effect, which is said"""
    export_quantization_maxlen: Positive = 1024
    """no effect, which is said"""
    export_legacy_format: bool = False
    """only false: pickled weights are not written"""
    export_hub_model_id: str | None = None
    """`--push`"""
    task: str | None = None
    """`lowrank eval --tasks`"""
    task_dir: str = "evaluation"
    """no effect: lm-eval brings its own"""
    n_shot: NonNegative = 5
    """`--num-fewshot`"""
    lang: Literal["en", "zh"] = "en"
    """no effect: lm-eval's tasks have theirs"""
    save_dir: str | None = None
    """`--output`"""
    batch_size: Positive = 4
    """no effect: batches follow from memory"""


def read_use_keys(settings: Mapping[str, Any]) -> tuple[UseKeys, list[str]]:
    """The keys that count, and what is wrong with any."""
    names = known()
    problems = [f"{key}: unknown key{did_you_mean(key, names)}" for key in settings if key not in names]
    given = {key: value for key, value in settings.items() if key in UseKeys.model_fields and value is not None}
    try:
        return UseKeys.model_validate(given), problems
    except ValidationError as error:
        wrong = {entry["loc"][0] for entry in error.errors()}
        kept = {key: value for key, value in given.items() if key not in wrong}
        return UseKeys.model_validate({"model_name_or_path": "-"} | kept), [
            *problems,
            *error_lines(error, settings, UseKeys),
        ]

"""Files of LLaMA-Factory's V1 (`USE_V1=1`), read where they say what V0's files say.

V1 mapping -> V0 mapping and the datasets that its own YAML names -> `convert`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.compat.llamafactory.dataset_info import places_of
from lowrank.config import read_file
from lowrank.data.sources.places import WHOLE
from lowrank.errors import ConfigError, did_you_mean, raise_all

_MARKS = ({"model", "peft_config"}, {"model", "train_dataset"}, {"model", "dist_config"})
"""Keys that stand side by side in no file of ours or of V0's."""

_SAME = {
    "trust_remote_code", "output_dir", "cutoff_len", "learning_rate", "num_train_epochs", "max_grad_norm", "bf16",
    "seed", "save_steps", "save_total_limit", "logging_steps", "pref_loss", "pref_beta", "pref_ftx", "simpo_gamma",
    "dpo_label_smoothing", "ld_alpha", "max_steps",
}  # fmt: skip
"""Keys of V1 that mean the same in V0."""
_DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 1e-4, "bf16": True, "logging_steps": 1, "weight_decay": 0.01, "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 1, "overwrite_output_dir": True,
}  # fmt: skip
"""What V1 takes where its file says nothing, and V0 takes something else."""
_SILENT = {
    "flash_attn", "model_class", "kernel_config", "batching_workers", "sample_backend", "max_new_tokens",
    "dist_timeout", "full_determinism", "cp_mode", "mp_replicate_size", "mp_shard_size", "save_ckpt_as_hf",
}  # fmt: skip
_PROCESSES = ("init_config", "dp_size", "cp_size")
_READ = {
    "model", "peft_config", "quant_config", "train_dataset", "eval_dataset", "micro_batch_size", "global_batch_size",
    "batching_strategy", "enable_activation_checkpointing", "optim_config", "lr_scheduler_config",
    "resume_from_checkpoint", "save_epochs", "custom_chat_template", "dist_config", "media_dir",
}  # fmt: skip
_CONVERTERS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "pair": "preference", None: None}


@dataclass
class V0:
    """The V0 form of a V1 file. `train` and `eval`: its datasets, as native sources."""

    settings: dict[str, Any]
    train: list[dict[str, Any]] = field(default_factory=list)
    eval: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def is_v1(settings: Mapping[str, Any]) -> bool:
    """Whether this is such a file."""
    return any(mark <= settings.keys() for mark in _MARKS) and not {"data", "jobs", "adapter"} & settings.keys()


def as_v0(settings: Mapping[str, Any], folder: Path) -> V0:
    """The same in V0's keys. Raises ConfigError for what V0 has no word for."""
    problems: list[str] = []
    known = {*_SAME, *_SILENT, *_PROCESSES, *_READ}
    problems += [f"{key}: unknown key of V1{did_you_mean(key, known)}" for key in settings if key not in known]
    given = {key: value for key, value in settings.items() if value is not None}
    v0: dict[str, Any] = {**_DEFAULTS, **{key: value for key, value in given.items() if key in _SAME}}
    v0["model_name_or_path"] = given.get("model", "-")
    found = V0(v0)
    v0 |= _peft(given.get("peft_config"), problems)
    v0 |= _quantization(given.get("quant_config"), problems)
    v0 |= _batches(given, problems)
    v0 |= _sharding(given.get("dist_config"), problems)
    v0 |= _optimizer(given, problems)
    if not given.get("enable_activation_checkpointing", True):
        v0["disable_gradient_checkpointing"] = True
    if "save_steps" not in given:
        v0["save_strategy"] = "no"
    if given.get("resume_from_checkpoint"):
        v0["resume_from_checkpoint"] = (
            True if given["resume_from_checkpoint"] == "auto" else str(given["resume_from_checkpoint"])
        )
    for key in ("save_epochs", "custom_chat_template"):
        problems += [f"{key}: V0 has no word for it, and neither is it read here; remove it"] if key in given else []
    processes: dict[str, Any] = {key: given[key] for key in _PROCESSES if key in given}
    sharded = given.get("dist_config")
    if isinstance(sharded, Mapping):
        read = {"name", "config_file", *(_FSDP if sharded.get("name") in _FSDP_NAMES else ())}
        processes |= {f"dist_config.{key}": sharded[key] for key in sharded if key not in read}
    requested = [key for key, value in processes.items() if value is True or value not in (None, False, 1)]
    if requested:
        found.warnings.append(
            f"{', '.join(requested)} has no effect: `devices` says how many train, and base: sharded that they hold "
            "the base between them"
        )
    if "train_dataset" in given:
        v0["do_train"] = True
        media_dir = given.get("media_dir")  # V0's word: V1 has none, and takes paths from where it is started
        found.train, pairs = _datasets(given["train_dataset"], folder, media_dir, problems)
        if "eval_dataset" in given:
            found.eval, _ = _datasets(given["eval_dataset"], folder, media_dir, problems)
        v0["stage"] = "dpo" if pairs else "sft"
    raise_all(ConfigError, "This file of LLaMA-Factory's V1 cannot be used as it is:", problems)
    return found


_FSDP_NAMES = ("fsdp2", "fsdpturbo")
_FSDP = ("reshard_after_forward", "offload_params")
"""What V0's fsdp_config says by the same names."""


def _sharding(config: Any, problems: list[str]) -> dict[str, Any]:
    """What cuts the model over the devices: FSDP2, which always cuts it whole there, or a file of DeepSpeed's."""
    if config is not None and not isinstance(config, Mapping):
        problems.append(f"dist_config: expected a mapping with a name (fsdp2 or deepspeed), got {config!r}")
        return {}
    config = config or {}
    name = config.get("name")
    if name in _FSDP_NAMES:
        options = {key: config[key] for key in _FSDP if config.get(key) is not None}
        return {"fsdp": "full_shard", **({"fsdp_config": options} if options else {})}
    if name == "deepspeed":
        return {"deepspeed": config["config_file"]} if config.get("config_file") else {}
    if name is not None:
        problems.append(f"dist_config: name: {name!r} is not known; use fsdp2 or deepspeed")
    return {}


def _peft(config: Any, problems: list[str]) -> dict[str, Any]:
    if config is None:
        return {"finetuning_type": "full"}
    config = dict(config) if isinstance(config, Mapping) else {}
    kind = config.pop("name", None)
    if kind == "freeze":
        keys = {"freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"}
        names = {key: key for key in keys} | {"cast_trainable_params_to_fp32": ""}
    elif kind == "lora":
        names = {
            "r": "lora_rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
            "target_modules": "lora_target", "use_rslora": "use_rslora", "use_dora": "use_dora",
            "modules_to_save": "additional_target", "adapter_name_or_path": "adapter_name_or_path",
            "export_dir": "export_dir", "export_size": "export_size", "export_hub_model_id": "export_hub_model_id",
            "infer_dtype": "infer_dtype", "export_legacy_format": "export_legacy_format",
        }  # fmt: skip
    else:
        problems.append(f"peft_config.name: {kind!r} is not read; choose lora or freeze")
        return {}
    problems += [
        f"peft_config.{key}: not read; remove it{did_you_mean(key, names)}" for key in config if key not in names
    ]
    found = {names[key]: value for key, value in config.items() if names.get(key) and value is not None}
    defaults = {"lora_rank": 8, "lora_alpha": 16} if kind == "lora" else {}
    return (
        {"finetuning_type": kind}
        | defaults
        | {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in found.items()}
    )


def _quantization(config: Any, problems: list[str]) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {}
    if config.get("name") not in ("bnb", "auto"):
        problems.append(f"quant_config.name: {config.get('name')!r} is not read; choose bnb")
    names = {"quantization_bit": "quantization_bit", "bnb_4bit_quant_type": "quantization_type"}
    return {names[key]: value for key, value in config.items() if key in names}


def _batches(given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    micro, whole = given.get("micro_batch_size", 1), given.get("global_batch_size")
    found: dict[str, Any] = {"per_device_train_batch_size": micro}
    if whole is not None and isinstance(whole, int) and isinstance(micro, int) and whole % max(1, micro) == 0:
        found["gradient_accumulation_steps"] = whole // micro
    elif whole is not None:
        problems.append(f"global_batch_size: {whole!r} is not a multiple of micro_batch_size {micro!r}")
    strategy = given.get("batching_strategy", "normal")
    if strategy in ("dynamic_batching", "dynamic_padding_free"):
        found["neat_packing"] = True  # steps of a number of tokens rather than of samples
    elif strategy not in ("normal", "padding_free"):
        problems.append(f"batching_strategy: {strategy!r} is not known")
    return found


def _optimizer(given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    optimizer, schedule = given.get("optim_config"), given.get("lr_scheduler_config")
    if isinstance(optimizer, Mapping):
        if optimizer.get("name") != "muon":
            problems.append(f"optim_config.name: {optimizer.get('name')!r} is not read; choose muon, or leave it out")
        found |= {"use_muon": True, "weight_decay": optimizer.get("wd", 0.1)}
    if isinstance(schedule, Mapping):
        rest = {
            key: value for key, value in schedule.items() if key not in ("name", "num_warmup_steps", "warmup_ratio")
        }
        found["lr_scheduler_type"] = schedule.get("name")
        found |= {"warmup_steps": schedule["num_warmup_steps"]} if "num_warmup_steps" in schedule else {}
        found |= {"warmup_ratio": schedule["warmup_ratio"]} if "warmup_ratio" in schedule else {}
        found |= {"lr_scheduler_kwargs": rest} if rest else {}
    return found


def _datasets(named: Any, folder: Path, media_dir: Any, problems: list[str]) -> tuple[list[dict[str, Any]], bool]:
    """Sources, and whether they hold pairs. A YAML file names several; anything else is one dataset."""
    path = Path(str(named))
    place = next((place for place in places_of(str(named), folder) if place.exists()), None)
    if path.suffix in (".yaml", ".yml"):
        if place is None:
            problems.append(f"train_dataset: there is no {path}")
            return [], False
        entries, root = read_file(place), place.resolve().parent
    else:
        local = {"source": "local"} if place is not None else {}
        entries, root = {"default": {"path": str(place or named), **local}}, Path()
    found, kinds = [], set()
    for name, entry in entries.items():
        if not isinstance(entry, Mapping) or "path" not in entry:
            problems.append(f"dataset {name!r}: expected {{path: ...}}")
            continue
        extra = set(entry) - {"path", "source", "converter", "split", "size", "weight", "subset"}
        problems += [f"dataset {name!r}: {key} is not read; remove it" for key in sorted(extra)]
        if entry.get("converter") not in _CONVERTERS:
            problems.append(
                f"dataset {name!r}: converter {entry['converter']!r} is not read; choose alpaca, sharegpt, pair"
            )
            continue
        kinds.add(entry.get("converter") == "pair")
        found.append(_source(entry, root, media_dir))
    if len(kinds) > 1:
        problems.append(
            "train_dataset: some entries hold pairs (converter: pair) and some do not; give files of one kind"
        )
    return found, kinds == {True}


def _source(entry: Mapping[str, Any], root: Path, media_dir: Any) -> dict[str, Any]:
    source: dict[str, Any] = {"path": str(entry["path"])}
    if media_dir is not None:
        source["media_dir"] = str(media_dir)
    if entry.get("source") == "local":
        near = next((base for base in (Path(), root, root.parent) if (base / source["path"]).exists()), Path())
        if not Path(source["path"]).is_absolute():  # then its rows name files from where they themselves are named from
            source.setdefault("media_dir", str(near))
        source["path"] = str(near / source["path"])
        if Path(source["path"]).is_dir():
            source["split"] = WHOLE
    elif entry.get("split"):
        source["split"] = entry["split"]
    if (form := _CONVERTERS[entry.get("converter")]) is not None:
        source["format"] = form
    names = {"size": "max_samples", "weight": "weight", "subset": "subset"}
    return source | {names[key]: entry[key] for key in names if entry.get(key)}

"""A LLaMA-Factory (v0) training file, read as it is.

    their mapping -> Keys (checked, with LLaMA-Factory's defaults) -> the native mapping

What a key becomes stands in `llamafactory_keys` and `llamafactory_others`. A key that cannot be honored is an error
that names the way out; a key without effect here is a warning if it would have mattered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowrank.compat import llamafactory_method as method
from lowrank.compat import llamafactory_templates
from lowrank.compat.dataset_info import find_info, places_of, read_info, remote_info, sources
from lowrank.compat.llamafactory_devices import spread
from lowrank.compat.llamafactory_keys import Keys
from lowrank.compat.llamafactory_method import PREFERENCE_LOSSES, STAGES
from lowrank.compat.llamafactory_others import NO_EFFECT, REFUSED, find, is_default, known
from lowrank.compat.llamafactory_sharding import sharding
from lowrank.config.problems import error_lines
from lowrank.config.schema import RunConfig
from lowrank.data.tokenized import is_written
from lowrank.errors import ConfigError, did_you_mean, raise_all
from lowrank.report.reporters.trackers import known_trackers
from lowrank.third_party import names_code

MARKS = ("model_name_or_path", "finetuning_type", "stage", "dataset", "dataset_dir", "template")
"""Keys that only such a file has."""

Datasets = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""Native sources, for training and for evaluation."""

PAGE = "docs/llamafactory.md"
"""Every key of theirs, and what becomes of it."""

MIXES = {
    "interleave_under": "interleave",
    "interleave_over": "interleave_over",
    "interleave_once": "interleave_once",
}
"""`mix_strategy` -> `data.mix`, where it is not concat."""

METRICS = {
    f"{prefix}{theirs}": ours
    for theirs, ours in {
        "loss": "loss",
        "bleu-4": "llamafactory_bleu4",
        "rouge-1": "llamafactory_rouge1",
        "rouge-2": "llamafactory_rouge2",
        "rouge-l": "llamafactory_rougeL",
    }.items()
    for prefix in ("", "eval_")
}
"""`metric_for_best_model` -> `eval_metric`."""


@dataclass
class Converted:
    """The native form of a file, and what its reader should know."""

    config: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def is_llamafactory(settings: Mapping[str, Any]) -> bool:
    """Whether this is such a file rather than a native one."""
    return any(mark in settings for mark in MARKS) and not any(key in settings for key in ("model", "data", "jobs"))


def convert(settings: Mapping[str, Any], *, folder: Path, datasets: Datasets | None = None) -> Converted:
    """The native form of a LLaMA-Factory file that lies in `folder`.

    `datasets`: sources for training and evaluation, in place of names in a dataset_info.json. Raises `ConfigError` with
    every key that is unknown, malformed, or cannot be honored.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    problems, warnings = _sort_keys(settings)
    keys = _readable(settings, problems)
    problems += _contradictions(keys)
    train, evaluation = _kept_or_named(keys, folder, problems) if datasets is None else datasets
    config = {
        "model": method.model(keys, problems, warnings),
        "data": _data(keys, train, evaluation, problems, warnings),
        "adapter": method.adapter(keys),
        "objective": method.objective(keys, warnings),
        "optimizer": method.optimizer(keys, problems),
        "schedule": method.schedule(keys, problems, warnings),
        **_run(keys, problems, warnings),
    }
    placed, lines = sharding(keys, folder)
    config |= placed
    warnings += lines
    raise_all(ConfigError, "This LLaMA-Factory file cannot be used as it is:", problems)
    return Converted({key: value for key, value in config.items() if value != {}}, warnings)


def _readable(settings: Mapping[str, Any], problems: list[str]) -> Keys:
    """The honored keys; those that are malformed are reported and left at their defaults, so that all is checked."""
    given = {key: value for key, value in settings.items() if key in Keys.model_fields}
    try:
        return Keys.model_validate(given)
    except ValidationError as error:
        problems += error_lines(error, settings, RunConfig)
        malformed = {entry["loc"][0] for entry in error.errors()}
    required = {name: "-" for name, field in Keys.model_fields.items() if field.is_required()}
    return Keys.model_validate(required | {key: value for key, value in given.items() if key not in malformed})


def _sort_keys(settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What is wrong with the keys themselves, and which of them have no effect though they ask for something."""
    problems, warnings = [], []
    for key, value in settings.items():
        silent, refused = find(NO_EFFECT, key), find(REFUSED, key)
        if refused is not None and not is_default(refused, value):
            problems.append(f"{key}: {value!r} is not supported: {refused.why}")
        elif silent is not None and silent.speaks and not is_default(silent, value):
            warnings.append(f"{key} has no effect: {silent.why}")
        elif silent is None and refused is None and key not in Keys.model_fields:
            native = " (a native key; give it on the command line)" if key in RunConfig.model_fields else ""
            problems.append(f"{key}: unknown key{native}{did_you_mean(key, known(), PAGE)}")
    return problems, warnings


def _contradictions(keys: Keys) -> list[str]:
    found = [*_metric_contradictions(keys)]
    if not keys.do_train:
        found.append("do_train: it is not set, so LLaMA-Factory would not train; set do_train: true")
    if keys.stage not in STAGES:
        all_stages = ", ".join(STAGES)
        way = f"choose one of {all_stages}{did_you_mean(keys.stage, STAGES)}"
        found.append(f"stage: {keys.stage!r} is not trained; {way}")
    found += method.contradictions(keys)
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


def _metric_contradictions(keys: Keys) -> list[str]:
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


def _kept_or_named(keys: Keys, folder: Path, problems: list[str]) -> Datasets:
    """The file's datasets; where its `tokenized_path` is written already they need not be here, as there."""
    found: list[str] = []
    train, evaluation = _datasets(keys, folder, found)
    if found and keys.dataset and is_written(keys.tokenized_path):
        return [{"path": name} for name in keys.dataset], []
    problems += found
    return train, evaluation


def _datasets(keys: Keys, folder: Path, problems: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if not keys.dataset:
        problems.append("dataset: required, but not given")
    if keys.dataset_dir.startswith("REMOTE:"):
        place, complaint = remote_info(keys.dataset_dir.removeprefix("REMOTE:"))
        if place is None:
            problems.append(f"dataset_dir: {complaint}")
            return [], []
        return _named(keys, place, folder, problems)
    if keys.dataset_dir == "ONLINE":
        form = {"pt": "text", "dpo": "preference", "rm": "preference", "kto": "rated"}.get(keys.stage, "alpaca")
        train, evaluation = ([{"path": name, "format": form} for name in d] for d in (keys.dataset, keys.eval_dataset))
        return train, evaluation
    if keys.stage not in STAGES:
        return [], []  # what a dataset must hold depends on it
    place, places = find_info(keys.dataset_dir, folder)
    if place is None:
        looked = ", ".join(str(path.absolute()) for path in places)
        problems.append(f"dataset_dir: there is no dataset_info.json; looked for it in {looked}")
        return [], []
    return _named(keys, place, folder, problems)


def _named(keys: Keys, place: Path, folder: Path, problems: list[str]) -> Datasets:
    """The file's datasets by their names in the dataset_info.json at `place`. `folder`: where the file lies."""
    info, complaint = read_info(place)
    if complaint:
        problems.append(complaint)
        return [], []
    media_dir = _media_dir(keys, folder, problems)
    train, train_problems = sources(keys.dataset, info, place, keys.stage, media_dir)
    evaluation, eval_problems = sources(keys.eval_dataset, info, place, keys.stage, media_dir)
    problems += train_problems + [problem for problem in eval_problems if problem not in train_problems]
    return train, evaluation


def _media_dir(keys: Keys, folder: Path, problems: list[str]) -> Path | None:
    """Where pictures and sounds are, looked for as `dataset_dir` is; None: there."""
    if keys.media_dir is None:
        return None
    found = next((place for place in places_of(keys.media_dir, folder) if place.is_dir()), None)
    if found is None:
        problems.append(f"media_dir: there is no folder {keys.media_dir}")
    return found


def _data(
    keys: Keys,
    train: list[dict[str, Any]],
    evaluation: list[dict[str, Any]],
    problems: list[str],
    warnings: list[str],
) -> dict[str, Any]:
    samples, _, text = spread(keys.per_device_train_batch_size * keys.gradient_accumulation_steps)
    warnings += [text] if text else []
    packing = keys.neat_packing or (keys.stage == "pt" if keys.packing is None else keys.packing)
    data: dict[str, Any] = {"train": train, "eval": evaluation, "max_length": keys.cutoff_len}
    data |= {"batch_tokens": samples * keys.cutoff_len} if packing else {"batch_size": samples}
    if keys.stage == "pt":
        data["on_too_long"] = "split"  # LLaMA-Factory chops documents into blocks and loses no text
    optional = {
        "max_samples": keys.max_samples,
        "validation_split": int(keys.val_size) if keys.val_size >= 1 else keys.val_size,
        "streaming": keys.streaming,
        "train_on_prompt": keys.train_on_prompt,
        "mask_history": keys.mask_history,
        "default_system": keys.default_system,
        "tokenized_path": keys.tokenized_path,
    }
    data |= {key: value for key, value in optional.items() if value}
    if keys.split_special_tokens is not None:
        data["split_special_tokens"] = keys.split_special_tokens
    if keys.disable_shuffling:
        data["shuffle"] = False
    if keys.stage != "pt":
        data |= _template(keys, problems, warnings)
        if packing and not keys.neat_packing:
            warnings.append("packing: packed documents never see each other here; in LLaMA-Factory they do")
    if keys.max_samples:
        for source in (*train, *evaluation):
            source["max_samples"] = min(source.get("max_samples", keys.max_samples), keys.max_samples)
    return data | _mix(keys, train, problems)


def _template(keys: Keys, problems: list[str], warnings: list[str]) -> dict[str, Any]:
    """A built-in template of that name, or the tokenizer's own."""
    data: dict[str, Any] = {}
    if keys.template is not None:
        try:
            chosen = llamafactory_templates.choose(keys.template, keys.model_name_or_path)
        except ConfigError as error:
            problems.append(str(error))
        else:
            data |= {"chat_template": chosen.setting} if chosen.setting else {}
            warnings += [chosen.note] if chosen.note else []
    variables = {} if keys.enable_thinking else {"enable_thinking": False}
    variables |= {"preserve_thinking": True} if keys.preserve_thinking else {}
    if variables:
        data["chat_template_kwargs"] = variables
    return data


def _mix(keys: Keys, train: list[dict[str, Any]], problems: list[str]) -> dict[str, Any]:
    if keys.mix_strategy == "concat":
        if keys.interleave_probs:
            problems.append(
                "interleave_probs: only for mix_strategy: interleave_under, interleave_over, interleave_once"
            )
        return {}
    if keys.mix_strategy not in MIXES:
        problems.append(f"mix_strategy: {keys.mix_strategy!r} is not known; use concat, {', '.join(MIXES)}")
    if keys.interleave_probs and len(keys.interleave_probs) != len(keys.dataset):
        problems.append(f"interleave_probs: {len(keys.interleave_probs)} numbers for {len(keys.dataset)} datasets")
    for source, weight in zip(train, keys.interleave_probs):
        source["weight"] = weight
    return {"mix": MIXES.get(keys.mix_strategy, "concat")}


def _run(keys: Keys, problems: list[str], warnings: list[str]) -> dict[str, Any]:
    run: dict[str, Any] = {
        **method.tuning(keys),
        "seed": keys.seed,
        "output_dir": keys.output_dir,
        "micro_batch_tokens": min(4096, keys.per_device_train_batch_size * keys.cutoff_len),
    }
    _, devices, _ = spread(1)
    if devices != 1:
        run["devices"] = devices
    if keys.save_strategy not in ("no", "best"):
        run["save_total_limit"] = keys.save_total_limit
    run |= {"max_steps": keys.max_steps} if keys.max_steps > 0 else {"num_train_epochs": keys.num_train_epochs}
    if keys.neftune_noise_alpha:
        run["neftune_noise_alpha"] = keys.neftune_noise_alpha
    metric = METRICS.get(keys.metric_for_best_model, "loss")
    if metric != "loss":
        run |= {"eval_metric": metric, "eval_generate_samples": None, "eval_max_new_tokens": keys.max_new_tokens}
    if keys.early_stopping_steps:
        run["early_stopping_patience"] = keys.early_stopping_steps
    return run | _intervals(keys, problems, warnings) | _folder(keys, problems) | _reporters(keys, problems)


def _intervals(keys: Keys, problems: list[str], warnings: list[str]) -> dict[str, Any]:
    logging = _interval("logging", keys.logging_strategy, keys.logging_steps, keys, problems)
    strategy = keys.eval_strategy if keys.eval_strategy != "no" else keys.evaluation_strategy
    if strategy == "no" and keys.eval_steps is not None:
        warnings.append("eval_steps has no effect while eval_strategy is 'no'; set eval_strategy: steps")
    held_out = bool(keys.eval_dataset) or keys.val_size > 0
    if strategy != "no" and not held_out:
        problems.append(f"eval_strategy: {strategy!r} needs held-out rows; set eval_dataset or val_size")
    saving = "no" if keys.save_strategy == "best" else keys.save_strategy
    evaluation = _interval("eval", strategy, keys.eval_steps or keys.logging_steps, keys, problems)
    intervals = {"save_steps": _interval("save", saving, keys.save_steps, keys, problems)}
    if held_out:
        intervals["eval_steps"] = evaluation
    return intervals if logging is None else intervals | {"logging_steps": logging}


def _interval(what: str, strategy: str, steps: float, keys: Keys, problems: list[str]) -> float | None:
    """A strategy and its steps as a native interval. An epoch is a share of the epochs there are."""
    if strategy == "no":
        return None
    if strategy == "epoch":
        if keys.max_steps > 0:
            problems.append(f"{what}_strategy: 'epoch' is not supported together with max_steps; set it to steps")
            return None
        # a run of one epoch or less has its only epoch's end at the end of the run
        return 1 / keys.num_train_epochs if keys.num_train_epochs > 1 else None
    if steps >= 1 and steps != int(steps):
        problems.append(f"{what}_steps: expected a whole number, or a share below 1, got {steps:g}")
    return int(steps) if steps >= 1 else steps


def _folder(keys: Keys, problems: list[str]) -> dict[str, Any]:
    checkpoint = keys.resume_from_checkpoint
    if isinstance(checkpoint, str):
        problems.append(
            f"resume_from_checkpoint: {checkpoint!r} may be another program's checkpoint; set it to true to go on from "
            "the last checkpoint in output_dir, or give the adapter as adapter_name_or_path"
        )
    if checkpoint:
        return {"resume": True}
    return {"overwrite": True} if keys.overwrite_output_dir else {"resume": checkpoint is None}


def _reporters(keys: Keys, problems: list[str]) -> dict[str, Any]:
    known = known_trackers()
    names = [name for name in keys.report_to if name != "none"]
    if keys.use_swanlab and "swanlab" not in names:
        names.append("swanlab")
    problems += [
        f"report_to: {name!r} is not supported; choose from {', '.join(known)}, none, or your own my_module:MyReporter"
        for name in names
        if name not in known and not names_code(name)
    ]
    return {"report_to": names} if names else {}

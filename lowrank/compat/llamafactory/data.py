"""What of a LLaMA-Factory file says what is learned from: datasets, lengths, batches, template, mix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank.compat.llamafactory import templates
from lowrank.compat.llamafactory.dataset_info import find_info, places_of, read_info, remote_info, sources
from lowrank.compat.llamafactory.devices import spread
from lowrank.compat.llamafactory.keys import Keys
from lowrank.compat.llamafactory.method import STAGES
from lowrank.data.tokenized import is_written
from lowrank.errors import ConfigError

Datasets = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""Native sources, for training and for evaluation."""


MIXES = {
    "interleave_under": "interleave",
    "interleave_over": "interleave_over",
    "interleave_once": "interleave_once",
}
"""`mix_strategy` -> `data.mix`, where it is not concat."""


def named_datasets(keys: Keys, folder: Path, problems: list[str]) -> Datasets:
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


def data_settings(
    keys: Keys,
    train: list[dict[str, Any]],
    evaluation: list[dict[str, Any]],
    problems: list[str],
    warnings: list[str],
) -> dict[str, Any]:
    """`data` in native form, with the sources that were found. Adds what cannot be honored to `problems`, and what is
    worth a word to `warnings`."""
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
            chosen = templates.choose(keys.template, keys.model_name_or_path)
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

"""The arguments of `lowrank chat`, `serve`, `export`, `predict` and `eval` that LLaMA-Factory's keys stand for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from lowrank.compat.llamafactory import templates
from lowrank.compat.llamafactory.dataset_info import find_info, places_of
from lowrank.compat.llamafactory.use_keys import UseKeys


def keys_without_effect(command: str, keys: UseKeys) -> list[str]:
    """One note for each key that is given and has no effect."""
    notes = []
    if keys.infer_backend != "huggingface" and not (command == "serve" and keys.infer_backend == "vllm"):
        way = "; `lowrank serve` has vllm" if keys.infer_backend == "vllm" else ""
        notes.append(f"infer_backend: {keys.infer_backend} has no effect: answers come from lowrank's engine{way}")
    if keys.infer_dtype != "auto":
        notes.append("infer_dtype has no effect: weights keep the dtype they were saved in")
    if keys.num_beams > 1 and command != "export":
        notes.append("num_beams has no effect: answers are drawn, not searched for")
    if not keys.skip_special_tokens:
        notes.append("skip_special_tokens has no effect: special tokens are never part of an answer")
    if keys.export_quantization_bit is not None and command == "export":
        of_rows = ("export_quantization_nsamples", "export_quantization_maxlen")
        notes += [
            f"{name} has no effect: how many documents calibration takes, and how long, is fixed here"
            for name in of_rows
            if name in keys.model_fields_set
        ]
    if not keys.enable_thinking and command != "export":
        notes.append("enable_thinking has no effect: a trained adapter reads as it was trained; a base by its template")
    return notes


def model_arguments(keys: UseKeys, problems: list[str], several: bool = False) -> list[str]:
    """Who answers: the adapter on its base, or the base."""
    if keys.quantization_bit is not None:
        problems.append(
            f"quantization_bit: {keys.quantization_bit} is not applied while answering; `lowrank quantize` writes a "
            "copy of the base that is, and a run trained on 4 bits answers in them"
        )
    adapters = ",".join(keys.adapter_name_or_path)
    if not adapters:
        return [keys.model_name_or_path]
    if "," not in adapters:
        return [adapters, "--base", keys.model_name_or_path]
    if not several:
        problems.append(
            "adapter_name_or_path: several are merged one after another there; make one of them first: lowrank export "
            f"{keys.model_name_or_path} --adapter {adapters} --combine add"
        )
    return [keys.model_name_or_path, "--adapter", adapters, "--combine", "add"]


def _template(keys: UseKeys, notes: list[str]) -> list[str]:
    """The option that chooses what `template` names."""
    if keys.template is None:
        return []
    chosen = templates.choose(keys.template, keys.model_name_or_path)
    notes += [chosen.note] if chosen.note else []
    return ["--chat-template", chosen.setting] if chosen.setting else []


def _sampling(keys: UseKeys) -> list[str]:
    arguments = ["--max-new-tokens", str(keys.max_new_tokens)]
    if keys.do_sample and keys.temperature > 0:
        arguments += [
            "--temperature",
            f"{keys.temperature:g}",
            "--top-p",
            f"{keys.top_p:g}",
            "--top-k",
            str(keys.top_k),
        ]
    if keys.repetition_penalty != 1.0:
        arguments += ["--repetition-penalty", f"{keys.repetition_penalty:g}"]
    return arguments


def _chat(keys: UseKeys, folder: Path, problems: list[str], notes: list[str]) -> list[str]:
    del folder
    arguments = [*model_arguments(keys, problems), *_template(keys, notes), *_sampling(keys)]
    return [*arguments, "--system", keys.default_system] if keys.default_system else arguments


def _serve(keys: UseKeys, folder: Path, problems: list[str], notes: list[str]) -> list[str]:
    del folder
    arguments = [*model_arguments(keys, problems), *_template(keys, notes)]
    arguments += ["--engine", "vllm"] if keys.infer_backend == "vllm" else []
    for name, option in (("API_HOST", "--host"), ("API_PORT", "--port")):
        arguments += [option, os.environ[name]] if os.environ.get(name) else []
    if os.environ.get("API_KEY"):
        notes.append("API_KEY has no effect: set LOWRANK_TOKEN, or a new key is printed")
    notes.append("clients choose temperature, top_p and max_tokens themselves; those of the file are not used")
    return arguments


def _export(keys: UseKeys, folder: Path, problems: list[str], notes: list[str]) -> list[str]:
    if not keys.export_dir:
        problems.append("export_dir: required, but not given")
    if keys.export_legacy_format:
        problems.append("export_legacy_format: .bin files are pickles, which are not written; remove it")
    arguments = [*model_arguments(keys, problems, several=True), *_template(keys, notes)]
    arguments += ["--output", keys.export_dir or "-"]
    arguments += ["--push", keys.export_hub_model_id] if keys.export_hub_model_id else []
    if keys.export_quantization_bit is None:
        return [*arguments, f"max_shard_size={keys.export_size}GB"]
    arguments += ["--to", "gptq", f"bits={keys.export_quantization_bit}"]
    if keys.export_quantization_dataset:
        arguments.append(f"calibration={_found(keys.export_quantization_dataset, folder)}")
    return [*arguments, f"max_shard_size={keys.export_size}GB"]


def predict_arguments(keys: UseKeys, folder: Path, problems: list[str], notes: list[str]) -> list[str]:
    """`lowrank predict` of the questions in `eval_dataset`. `problems` and `notes` get what is wrong and what is worth
    a word."""
    if keys.stage != "sft":
        problems.append(f"stage: {keys.stage!r} does not predict; only sft does")
    if not keys.eval_dataset:
        problems.append("eval_dataset: required, but not given; questions come from it")
    place, places = find_info(keys.dataset_dir, folder)
    if place is None:
        looked = ", ".join(str(each.absolute()) for each in places)
        problems.append(f"dataset_dir: there is no dataset_info.json; looked for it in {looked}")
    arguments = [*model_arguments(keys, problems), *_template(keys, notes), *_sampling(keys)]
    arguments += ["--data", ",".join(keys.eval_dataset), "--dataset-dir", str(place or keys.dataset_dir)]
    arguments += ["--max-samples", str(keys.max_samples)] if keys.max_samples else []
    arguments += ["--output", keys.output_dir] if keys.output_dir else []
    return [*arguments, "--seed", str(keys.seed), "--llamafactory"]


_TASKS = {"mmlu": "mmlu", "ceval": "ceval-valid", "cmmlu": "cmmlu"}


def _eval(keys: UseKeys, folder: Path, problems: list[str], notes: list[str]) -> list[str]:
    del folder
    name = re.sub(r"_(test|validation|valid|train|dev)$", "", keys.task or "")
    if keys.task is None:
        problems.append("task: required, but not given; as mmlu_test, ceval_validation or cmmlu_test")
    elif name not in _TASKS:
        problems.append(
            f"task: {keys.task!r} is not known; choose {', '.join(_TASKS)}, or `lowrank eval MODEL --tasks`"
        )
    notes.append("the questions and the way they are asked are lm-eval's, so numbers differ from old reports")
    arguments = [*model_arguments(keys, problems), *_template(keys, notes), "--tasks", _TASKS.get(name, "mmlu")]
    return [*arguments, "--num-fewshot", str(keys.n_shot), *(["--output", keys.save_dir] if keys.save_dir else [])]


def _found(path: str, folder: Path) -> str:
    """From the current directory, else from the file's folder and those above it."""
    return str(next((place for place in places_of(path, folder) if place.exists()), path))


COMMANDS: Mapping[str, Callable[[UseKeys, Path, list[str], list[str]], list[str]]] = {
    "chat": _chat,
    "serve": _serve,
    "export": _export,
    "predict": predict_arguments,
    "eval": _eval,
}
"""(keys, the folder of their file, what is wrong, what is worth a word) -> the words after each command; the last two
are added to."""

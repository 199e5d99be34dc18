"""LLaMA-Factory files and flags that ask for something else than training, as the words of a command here.

    lowrank chat qwen3_lora_sft.yaml      -> lowrank chat saves/qwen3/lora/sft --base Qwen/Qwen3-4B ...
    lowrank train --stage sft --do_train  -> lowrank train stage=sft do_train=true

What a file leaves out has LLaMA-Factory's default, as in training (temperature 0.95, top_p 0.7, top_k 50, ...).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lowrank.compat import llamafactory_templates
from lowrank.compat.dataset_info import find_info, places_of
from lowrank.compat.llamafactory import is_llamafactory
from lowrank.compat.llamafactory_flags import has_flags, split_flags
from lowrank.compat.llamafactory_others import known
from lowrank.compat.llamafactory_use_keys import UseKeys
from lowrank.compat.llamafactory_v1 import as_v0, is_v1
from lowrank.config import override, read_file
from lowrank.config.schema import DEFAULT_JOB
from lowrank.errors import ConfigError, did_you_mean, raise_all
from lowrank.export.publish.hub import check_push
from lowrank.setting_problems import error_lines

ELSEWHERE = {
    "api": "`lowrank serve FILE` answers OpenAI clients, as `llamafactory-cli api FILE` does; FILE may be the same",
    "webchat": "`lowrank chat FILE` talks in the terminal, and `lowrank board` in a browser",
    "webui": "`lowrank board` opens the board in a browser: data, training, chat and export",
    "env": "`lowrank doctor` says what this machine has and can do",
    "version": "`lowrank --version` prints the version",
}
"""Commands of llamafactory-cli that have another name here, and what does the same."""

SETTINGS_COMMANDS = ("train", "plan", "show", "data")
"""Commands that take settings of training."""


@dataclass(frozen=True)
class TranslatedCommand:
    """What to run in place of the words that were given (None: those).

    notes     warnings
    read_as   the command in full, to be said
    first     commands that come before
    then      commands that follow where that one succeeds
    """

    arguments: list[str] | None
    notes: list[str] = field(default_factory=list)
    read_as: str | None = None
    first: list[list[str]] = field(default_factory=list)
    then: list[list[str]] = field(default_factory=list)


def translate(arguments: Sequence[str]) -> TranslatedCommand:
    """Words of a command line, if they are LLaMA-Factory's. Raises ConfigError for what cannot be done here."""
    command, rest = (arguments[0], list(arguments[1:])) if arguments else ("", [])
    if command in ELSEWHERE:
        raise ConfigError(f"`{command}` is a command of llamafactory-cli; here {ELSEWHERE[command]}")
    if command not in (*SETTINGS_COMMANDS, *_COMMANDS):
        return TranslatedCommand(None)
    if has_flags(rest):
        given, others = split_flags(rest, known())
        settings = override({}, given)
        if command in SETTINGS_COMMANDS and _trains(settings, command):
            first, changed = _merged_first(command, settings)
            then = _afterwards(command, settings, Path(), others)
            return TranslatedCommand([command, *given, *changed, *others], first=first, then=then)
        return _command(command, override({}, given), Path(), "these flags", others)
    if not rest or not rest[0].lower().endswith((".yaml", ".yml", ".json")) or not Path(rest[0]).is_file():
        return TranslatedCommand(None)
    file = Path(rest[0])
    if command == "data" and file.suffix == ".json":
        return TranslatedCommand(None)  # rows
    settings = read_file(file)
    if is_v1(settings):
        settings = as_v0(settings, file.parent).settings
    if not is_llamafactory(settings):
        return TranslatedCommand(None)
    keys = known()
    overriding = [argument for argument in rest[1:] if argument.partition("=")[0] in keys and "=" in argument]
    settings = override(settings, overriding)
    if command in SETTINGS_COMMANDS and _trains(settings, command):
        first, changed = _merged_first(command, settings)
        then = _afterwards(command, settings, file.parent, rest[1:])
        return TranslatedCommand([*arguments, *changed], first=first, then=then)
    others = [argument for argument in rest[1:] if argument not in overriding]
    return _command(command, settings, file.parent, str(file), others)


@dataclass(frozen=True)
class AnsweringFile:
    """A LLaMA-Factory file as `lowrank chat` reads it: who answers, and how.

    model           a path or a name of the hub: an adapter's, or the base's
    base            where the adapter's base is; None without adapter
    chat_template   what `template` names; None: the model's own
    system          `default_system`
    sampling        what it says of `GenerationConfig`, LLaMA-Factory's defaults where it says nothing
    notes           warnings
    """

    model: str
    base: str | None
    chat_template: str | None
    system: str | None
    sampling: Mapping[str, Any]
    notes: Sequence[str]


def answering_file(path: str) -> AnsweringFile | None:
    """The file at `path`; None where it is no file of LLaMA-Factory's. ConfigError for what cannot be done here."""
    translated = translate(["chat", path])
    if translated.arguments is None:
        return None
    _, model, *options = translated.arguments
    given = dict(zip(options[::2], options[1::2]))
    base, chat_template, system = (given.pop(name, None) for name in ("--base", "--chat-template", "--system"))
    sampling = {name[2:].replace("-", "_"): yaml.safe_load(value) for name, value in given.items()}
    return AnsweringFile(model, base, chat_template, system, sampling, translated.notes)


def _trains(settings: Mapping[str, Any], command: str) -> bool:
    """Whether training is asked for; what is wrong with it is said where training files are read."""
    return bool(settings.get("do_train")) or command != "train" or not _purpose(settings)


def _merged_first(command: str, settings: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    """`create_new_adapter`: the command that merges the given adapters into a copy of the base, and what is then
    trained instead."""
    keys, _ = _read(settings)
    if command != "train" or not keys.create_new_adapter or not keys.adapter_name_or_path or keys.output_dir is None:
        return [], []
    place = Path(f"{keys.output_dir.rstrip('/')}-base")
    changed = [f"model_name_or_path={place}", "adapter_name_or_path=null", "create_new_adapter=false"]
    if (place / "config.json").is_file():
        return [], changed
    source = _model(keys.model_copy(update={"quantization_bit": None}), [], several=True)
    return [["export", *source, "--to", "merged", "--output", str(place)]], changed


def _afterwards(command: str, settings: Mapping[str, Any], folder: Path, others: Sequence[str]) -> list[list[str]]:
    """What follows training: `do_predict` and `push_to_hub`. Checked before it begins; ConfigError."""
    keys, _ = _read(settings)  # what is wrong with keys is said where training files are read
    if command != "train" or keys.output_dir is None or not (keys.do_predict or keys.push_to_hub):
        return []
    commands: list[list[str]] = []
    problems: list[str] = []
    quietly = ["--json"] if "--json" in others else []
    if keys.do_predict:
        which = [] if keys.load_best_model_at_end else ["--last"]
        which += ["--adapter", DEFAULT_JOB] if keys.finetuning_type in ("lora", "oft") else []
        trained = keys.model_copy(update={"model_name_or_path": keys.output_dir, "adapter_name_or_path": (), "template":
                                          None, "quantization_bit": None,
                                          "output_dir": str(Path(keys.output_dir) / "predict")})  # fmt: skip
        commands.append(["predict", *_predict(trained, folder, problems, []), *which, *quietly])
    if keys.push_to_hub:
        target = "peft" if keys.finetuning_type in ("lora", "oft") else "merged"
        if not keys.hub_model_id:
            problems.append("push_to_hub: needs hub_model_id, as owner/name")
        else:
            check_push(keys.hub_model_id, [target], dry_run=False)
            commands.append(["export", keys.output_dir, "--to", target, "--push", keys.hub_model_id, *quietly])
    raise_all(ConfigError, "What follows training cannot be done:", problems)
    return commands


def _purpose(settings: Mapping[str, Any]) -> str:
    """The command that does what a file without `do_train` is for; empty where it is a training file in the making."""
    if settings.get("do_predict"):
        return "predict"
    if settings.get("task"):
        return "eval"
    if settings.get("export_dir"):
        return "export"
    return "" if settings.get("dataset") or settings.get("stage") or settings.get("do_eval") else "chat"


def _command(
    command: str, settings: Mapping[str, Any], folder: Path, source: str, others: Sequence[str]
) -> TranslatedCommand:
    purpose = _purpose(settings)
    if command == "train" and purpose == "predict":
        command = "predict"  # as there, where `train` predicts too
    if command in SETTINGS_COMMANDS:
        also = " (or serve)" if purpose == "chat" else ""
        raise ConfigError(
            f"{source} trains nothing (there is no do_train: true); it is for `lowrank {purpose} {source}`{also}"
        )
    keys, problems = _read(settings)
    notes = _unheard(command, keys)
    arguments = _COMMANDS[command](keys, folder, problems, notes)
    raise_all(ConfigError, f"{source} cannot be used by `lowrank {command}`:", problems)
    own = _without_given(arguments, others)
    read_as = f"{source} is read as: {shlex.join(['lowrank', command, *own, *others])}"
    return TranslatedCommand([command, *own, *others], notes, read_as)


def _read(settings: Mapping[str, Any]) -> tuple[UseKeys, list[str]]:
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


def _unheard(command: str, keys: UseKeys) -> list[str]:
    """What is asked for and has no effect."""
    unheard = []
    if keys.infer_backend != "huggingface" and not (command == "serve" and keys.infer_backend == "vllm"):
        way = "; `lowrank serve` has vllm" if keys.infer_backend == "vllm" else ""
        unheard.append(f"infer_backend: {keys.infer_backend} has no effect: answers come from lowrank's engine{way}")
    if keys.infer_dtype != "auto":
        unheard.append("infer_dtype has no effect: weights keep the dtype they were saved in")
    if keys.num_beams > 1 and command != "export":
        unheard.append("num_beams has no effect: answers are drawn, not searched for")
    if not keys.skip_special_tokens:
        unheard.append("skip_special_tokens has no effect: special tokens are never part of an answer")
    if keys.export_quantization_bit is not None and command == "export":
        of_rows = ("export_quantization_nsamples", "export_quantization_maxlen")
        unheard += [
            f"{name} has no effect: how many documents calibration takes, and how long, is fixed here"
            for name in of_rows
            if name in keys.model_fields_set
        ]
    if not keys.enable_thinking and command != "export":
        unheard.append(
            "enable_thinking has no effect: a trained adapter reads as it was trained; a base by its template"
        )
    return unheard


def _model(keys: UseKeys, problems: list[str], several: bool = False) -> list[str]:
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
    chosen = llamafactory_templates.choose(keys.template, keys.model_name_or_path)
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
    arguments = [*_model(keys, problems), *_template(keys, notes), *_sampling(keys)]
    return [*arguments, "--system", keys.default_system] if keys.default_system else arguments


def _serve(keys: UseKeys, folder: Path, problems: list[str], notes: list[str]) -> list[str]:
    del folder
    arguments = [*_model(keys, problems), *_template(keys, notes)]
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
    arguments = [*_model(keys, problems, several=True), *_template(keys, notes), "--output", keys.export_dir or "-"]
    arguments += ["--push", keys.export_hub_model_id] if keys.export_hub_model_id else []
    if keys.export_quantization_bit is None:
        return [*arguments, f"max_shard_size={keys.export_size}GB"]
    arguments += ["--to", "gptq", f"bits={keys.export_quantization_bit}"]
    if keys.export_quantization_dataset:
        arguments.append(f"calibration={_found(keys.export_quantization_dataset, folder)}")
    return [*arguments, f"max_shard_size={keys.export_size}GB"]


def _predict(keys: UseKeys, folder: Path, problems: list[str], notes: list[str]) -> list[str]:
    if keys.stage != "sft":
        problems.append(f"stage: {keys.stage!r} does not predict; only sft does")
    if not keys.eval_dataset:
        problems.append("eval_dataset: required, but not given; questions come from it")
    place, places = find_info(keys.dataset_dir, folder)
    if place is None:
        looked = ", ".join(str(each.absolute()) for each in places)
        problems.append(f"dataset_dir: there is no dataset_info.json; looked for it in {looked}")
    arguments = [*_model(keys, problems), *_template(keys, notes), *_sampling(keys)]
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
    arguments = [*_model(keys, problems), *_template(keys, notes), "--tasks", _TASKS.get(name, "mmlu")]
    return [*arguments, "--num-fewshot", str(keys.n_shot), *(["--output", keys.save_dir] if keys.save_dir else [])]


def _found(path: str, folder: Path) -> str:
    """From the current directory, else from the file's folder and those above it."""
    return str(next((place for place in places_of(path, folder) if place.exists()), path))


def _without_given(arguments: Sequence[str], others: Sequence[str]) -> list[str]:
    """The words without options that the person gives too."""
    given = {argument.partition("=")[0] for argument in others if argument.startswith("--")}
    kept: list[str] = []
    place = 0
    while place < len(arguments):
        width = 2 if arguments[place].startswith("--") and arguments[place] != "--llamafactory" else 1
        if arguments[place] not in given:
            kept += arguments[place : place + width]
        place += width
    return kept


_COMMANDS: Mapping[str, Callable[[UseKeys, Path, list[str], list[str]], list[str]]] = {
    "chat": _chat,
    "serve": _serve,
    "export": _export,
    "predict": _predict,
    "eval": _eval,
}

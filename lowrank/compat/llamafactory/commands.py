"""LLaMA-Factory files and flags that ask for something else than training, as the words of a command here.

    lowrank chat qwen3_lora_sft.yaml      -> lowrank chat saves/qwen3/lora/sft --base Qwen/Qwen3-4B ...
    lowrank train --stage sft --do_train  -> lowrank train stage=sft do_train=true

What a file leaves out has LLaMA-Factory's default, as in training (temperature 0.95, top_p 0.7, top_k 50, ...).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lowrank.compat.llamafactory.arguments import COMMANDS, keys_without_effect, model_arguments, predict_arguments
from lowrank.compat.llamafactory.convert import is_llamafactory
from lowrank.compat.llamafactory.flags import has_flags, split_flags
from lowrank.compat.llamafactory.other_keys import known
from lowrank.compat.llamafactory.use_keys import read_use_keys
from lowrank.compat.llamafactory.v1 import as_v0, is_v1
from lowrank.config import override, read_file
from lowrank.config.schema import DEFAULT_JOB
from lowrank.errors import ConfigError, raise_all
from lowrank.export.publish.hub import check_push

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
    if command not in (*SETTINGS_COMMANDS, *COMMANDS):
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
    keys, _ = read_use_keys(settings)
    if command != "train" or not keys.create_new_adapter or not keys.adapter_name_or_path or keys.output_dir is None:
        return [], []
    place = Path(f"{keys.output_dir.rstrip('/')}-base")
    changed = [f"model_name_or_path={place}", "adapter_name_or_path=null", "create_new_adapter=false"]
    if (place / "config.json").is_file():
        return [], changed
    source = model_arguments(keys.model_copy(update={"quantization_bit": None}), [], several=True)
    return [["export", *source, "--to", "merged", "--output", str(place)]], changed


def _afterwards(command: str, settings: Mapping[str, Any], folder: Path, others: Sequence[str]) -> list[list[str]]:
    """What follows training: `do_predict` and `push_to_hub`. Checked before it begins; ConfigError."""
    keys, _ = read_use_keys(settings)  # what is wrong with keys is said where training files are read
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
        commands.append(["predict", *predict_arguments(trained, folder, problems, []), *which, *quietly])
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
    keys, problems = read_use_keys(settings)
    notes = keys_without_effect(command, keys)
    arguments = COMMANDS[command](keys, folder, problems, notes)
    raise_all(ConfigError, f"{source} cannot be used by `lowrank {command}`:", problems)
    own = _without_given(arguments, others)
    read_as = f"{source} is read as: {shlex.join(['lowrank', command, *own, *others])}"
    return TranslatedCommand([command, *own, *others], notes, read_as)


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

"""What Unsloth's notebooks give the trainers of TRL and transformers, as their present releases take it.

Notebooks are written for an older TRL, whose trainers took keywords that are fields of their settings now, and import
the trainers from `trl`, so translating has to happen there: `install` puts a translation before the constructors of
its trainers and settings. A call that the installed release understands passes as it is. What is translated is said,
each kind once.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import peft
import torch
import transformers
import trl

from lowrank.compat.unsloth.sampling import sampling_fields, stop_strings
from lowrank.compat.unsloth.trl_data import as_dataset, prepare, shorten_prompts
from lowrank.errors import ConfigError

_LOG = logging.getLogger(__name__)
_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "max_seq_length": "max_length",
    "warmup_ratio": "warmup_steps",
}
"""Fields by the name they have now, where the settings have one of that name. A `warmup_steps` below 1 is a ratio."""
_KEPT = ("max_prompt_length", "max_seq_length", "max_completion_length", "vllm_sampling_params")
"""Fields that are gone and that the trainers here still honor; kept as attributes of the settings."""
_WITHOUT_EFFECT = ("unsloth_num_chunks", "unsloth_logit_chunk_multiplier", "unsloth_grpo_mini_batch")
"""Fields of Unsloth's own that choose how, and not what, is computed."""
_EXPERIMENTAL = {"ORPOTrainer": "orpo", "ORPOConfig": "orpo", "CPOTrainer": "cpo", "CPOConfig": "cpo"}
"""Where TRL keeps what it had at its top."""
_MARK = "_takes_older_arguments"
_logged: set[str] = set()


def install() -> None:
    """Translate from now on; calling it again changes nothing."""
    _translated(transformers.TrainingArguments, _settings)
    _translated(transformers.Trainer, _processing_class)
    _translate_auto_peft()
    if not isinstance(trl, _Translating):  # pyright: ignore[reportUnnecessaryIsInstance] (its class is changed below)
        for name, value in list(vars(trl).items()):
            _noticed(name, value)
        module: Any = trl
        module.__class__ = _Translating


def _translate_auto_peft() -> None:
    """`load_in_4bit` and `load_in_8bit` of PEFT's loader, which transformers takes as a configuration now."""
    kind: Any = peft.AutoPeftModelForCausalLM
    if _MARK in vars(kind):
        return
    own = kind.from_pretrained.__func__

    @functools.wraps(own)
    def from_pretrained(cls: Any, *args: Any, **given: Any) -> Any:
        requested = {name: given.pop(name) for name in ("load_in_4bit", "load_in_8bit") if name in given}
        if any(requested.values()) and "quantization_config" not in given:
            given["quantization_config"] = transformers.BitsAndBytesConfig(**requested)
            _warn_once(
                f"{kind.__name__}: {', '.join(requested)}: given to BitsAndBytesConfig, where this release has it"
            )
        return own(cls, *args, **given)

    kind.from_pretrained = classmethod(from_pretrained)
    setattr(kind, _MARK, True)


class _Translating(type(trl)):  # type: ignore[misc]
    """The module `trl`; its classes are translated as they are first asked for, since importing them all is slow."""

    def __getattr__(self, name: str) -> Any:
        if name in _EXPERIMENTAL:
            return _noticed(name, _experimental(name))
        return _noticed(name, super().__getattr__(name))


def _experimental(name: str) -> Any:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import importlib

    return getattr(importlib.import_module(f"trl.experimental.{_EXPERIMENTAL[name]}"), name)


def _noticed(name: str, value: Any) -> Any:
    if inspect.isclass(value):
        if issubclass(value, transformers.TrainingArguments):
            _translated(value, _settings)
        elif issubclass(value, transformers.Trainer) and name.endswith("Trainer"):
            _translated(value, _trainer)
    return value


def _translated(kind: Any, translate: Callable[..., Callable[[], None] | None]) -> None:
    """Put `translate(self, kind, arguments by name)` before the constructor of `kind`, once."""
    own = kind.__init__
    if _MARK in vars(kind):
        return
    names = list(inspect.signature(own).parameters)[1:]

    @functools.wraps(own)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        if len(args) <= len(names) and not given.keys() & set(names[: len(args)]):
            given.update(zip(names, args))
            args = ()  # what is wrong with them otherwise, the constructor says
        afterwards = translate(self, kind, given)
        own(self, *args, **given)
        if afterwards is not None:
            afterwards()

    kind.__init__ = __init__
    setattr(kind, _MARK, True)


def _warn_once(sentence: str) -> None:
    if sentence not in _logged:
        _logged.add(sentence)
        _LOG.warning("%s", sentence)


# --- settings ---------------------------------------------------------------------------------------------------------


def _settings(own: Any, kind: Any, given: dict[str, Any]) -> Callable[[], None]:
    """Fields of `kind` by their present names; afterwards the settings get those that are gone as attributes."""
    known = {each.name for each in fields(kind)}
    title = type(own).__name__
    kept = {name: given.pop(name) for name in _KEPT if name in given and name not in known}
    if "max_length" in known and "max_seq_length" in kept:
        given["max_seq_length"] = kept.pop("max_seq_length")
    for old, new in _RENAMED.items():
        if old in given and old not in known and new in known:
            value = given.pop(old)
            if not (old == "warmup_ratio" and (given.get(new) or not value)):
                given[new] = value
            _warn_once(f"{title}: {old} is {new} in this release")
    for name in _WITHOUT_EFFECT:
        if name in given and name not in known:
            _warn_once(f"{title}: {name}={given.pop(name)!r} has no effect here")
    if kept.get("vllm_sampling_params") is not None:
        given.update(sampling_fields(kept["vllm_sampling_params"]))
        _warn_once(
            f"{title}: vllm_sampling_params: their values are taken; answers are drawn by the model's own generate()"
        )
    if "num_generations" in known:
        _fit_batch(given, title)
    if not torch.accelerator.is_available():
        _for_the_processor(given, title)
    return lambda: vars(own).update(kept)


def _for_the_processor(given: dict[str, Any], title: str) -> None:
    """Without a GPU: transformers wants to be told, and mixed precision is for GPUs."""
    if "use_cpu" not in given:
        given["use_cpu"] = True
        _warn_once(f"{title}: there is no GPU: use_cpu=True")
    if given.get("fp16"):
        given["fp16"] = False
        _warn_once(f"{title}: fp16=True: there is no GPU, the model's own dtype is used")
    if given.get("bf16") is None:
        given["bf16"] = False


def _fit_batch(given: dict[str, Any], title: str) -> None:
    """Groups have to fill the batches between two updates, as Unsloth sees to."""
    if given.get("generation_batch_size") is not None:
        return
    size = given.get("per_device_train_batch_size", 8)
    steps = given.get("steps_per_generation") or given.get("gradient_accumulation_steps", 1)
    group = given.get("num_generations", 8)
    if group and (size * steps * int(os.environ.get("WORLD_SIZE", "1"))) % group:
        given["per_device_train_batch_size"] = group
        _warn_once(
            f"{title}: per_device_train_batch_size={size} is no whole number of groups of num_generations: {group}"
        )


# --- trainers ---------------------------------------------------------------------------------------------------------


def _processing_class(own: Any, kind: Any, given: dict[str, Any]) -> None:
    if "tokenizer" in given:
        tokenizer = given.pop("tokenizer")
        given.setdefault("processing_class", tokenizer)
        _warn_once(f"{kind.__name__}: tokenizer is processing_class in this release")


def _trainer(own: Any, kind: Any, given: dict[str, Any]) -> Callable[[], None] | None:
    """Keywords that are fields of the settings now go there; the data as Unsloth would read it."""
    _processing_class(own, kind, given)
    signature = inspect.signature(kind.__init__).parameters
    config = getattr(sys.modules[kind.__module__], kind.__name__.replace("Trainer", "Config"), None)
    if config is None:
        return None
    known = {each.name for each in fields(config)}
    older = [name for name in given if name not in signature and name in {*known, *_KEPT, *_RENAMED}]
    moved = {name: given.pop(name) for name in older}
    ours = getattr(given.get("model"), "is_front_of_lowrank", False)
    if moved:
        _warn_once(f"{kind.__name__}: {', '.join(moved)}: given to {config.__name__}, where this release has it")
    if moved or ours:
        given["args"] = settings = _own_copy(given.get("args"), config)
        for name, value in moved.items():
            new = _RENAMED.get(name, name)
            setattr(settings, new if name not in known and new in known else name, value)
        if ours:
            _as_unsloth(kind, settings, given)
    limit = getattr(given.get("args"), "max_prompt_length", None)
    if limit and "max_prompt_length" not in known:
        return lambda: shorten_prompts(own, int(limit))
    return None


def _own_copy(settings: Any, config: Any) -> Any:
    """Settings of the trainer's own kind, which are nobody else's: a cell may be run twice."""
    if settings is None:
        return config(output_dir="trainer_output")
    if isinstance(settings, config):
        return copy.copy(settings)
    known = {each.name for each in fields(config)}
    values = {**settings.to_dict(), "hub_token": settings.hub_token}  # to_dict hides it
    converted = config(**{name: value for name, value in values.items() if name in known})
    vars(converted).update({name: getattr(settings, name) for name in _KEPT if name not in known and
                            hasattr(settings, name)})  # fmt: skip
    return converted


def _as_unsloth(kind: Any, settings: Any, given: dict[str, Any]) -> None:
    """For models of this front: texts are cut at the length the model was loaded with, and begin with one BOS."""
    length = getattr(given["model"], "max_seq_length", None)
    default = next((each.default for each in fields(settings) if each.name == "max_length"), None)
    if length and hasattr(settings, "max_length") and settings.max_length in (None, default):
        settings.max_length = length
    params, tokenizer = getattr(settings, "vllm_sampling_params", None), given.get("processing_class")
    if params is not None and tokenizer is not None and stop_strings(params, tokenizer):
        raise ConfigError(
            f"vllm_sampling_params: stop={params.stop!r}: in training EOS ({tokenizer.eos_token}) alone ends an "
            "answer; leave the others out"
        )
    if getattr(settings, "use_vllm", False):
        settings.use_vllm = False
        _warn_once(
            f"{kind.__name__}: use_vllm=True: answers are drawn by the model's own generate(), no vLLM is started"
        )
    if kind.__name__ == "SFTTrainer":
        field = settings.dataset_text_field
        formatting = given.get("formatting_func")
        for name in ("train_dataset", "eval_dataset"):
            if given.get(name) is not None:
                given[name] = as_dataset(prepare(given[name], field, tokenizer, formatting))
        if formatting is not None and field in (getattr(given.get("train_dataset"), "column_names", None) or ()):
            given["formatting_func"] = None

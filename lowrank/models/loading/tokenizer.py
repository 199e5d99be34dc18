"""The tokenizer of a model, and whether its path is a model at all: what needs no model, and none of the seconds that
importing the models' code takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from lowrank.errors import LowrankError, ModelError
from lowrank.foreign_files import find_json, read_json
from lowrank.hub_reach import hub_or_cache
from lowrank.media.processor import MediaProcessor, attach
from lowrank.models.config import ModelConfig
from lowrank.models.config_numbers import check_numbers
from lowrank.models.loading import kind
from lowrank.models.loading.quiet import quiet_transformers
from lowrank.models.packaged import locate
from lowrank.models.stop_tokens import ATTRIBUTE, declared_stop_tokens

FILE_FAULTS = (
    OSError, ValueError, LookupError, ImportError, SafetensorError, TypeError, AttributeError, RecursionError,
    ArithmeticError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises for a model's files that it can make nothing of."""


def check_model(config: ModelConfig) -> None:
    """ModelError for a path that is no causal language model, saying what it is; weights are not looked for. What
    cannot be had (a hub name without a network, code that may not run) is for those to say who need it."""
    path = locate(config.path)
    kind.check_path(path)
    if kind.plainly_causal(path):
        return
    try:
        with quiet_transformers(), hub_or_cache(path, config.revision):
            shape = transformers.AutoConfig.from_pretrained(
                path, revision=config.revision, trust_remote_code=config.runs_own_code
            )
    except Exception:  # whatever transformers makes of somebody's file; who needs it, says it
        return
    check_numbers(shape.to_dict(), f"the configuration of {config.path}")
    kind.refuse_kernels({**shape.to_dict(), **vars(shape)}, f"the configuration of {config.path}")
    kind.check_causal(shape, config.path)


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer. Needs no weights, so data can be checked before a model loads; nor a model, where a folder
    holds a tokenizer alone. ModelError if it cannot be had, or is none."""
    folder = Path(locate(config.path))
    if (folder / "config.json").is_file() or not (folder / "tokenizer_config.json").is_file():
        check_model(config)
    kind.check_tokenizer(locate(config.path))
    with quiet_transformers(), hub_or_cache(locate(config.path), config.revision):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                locate(config.path),
                revision=config.revision,
                trust_remote_code=config.runs_own_code,
                **_configuration_of(folder),
            )
            setattr(tokenizer, ATTRIBUTE, declared_stop_tokens(locate(config.path), config.revision))
            if not isinstance(tokenizer.model_max_length, (int, float)):
                raise ModelError(
                    f"{config.path}: model_max_length in tokenizer_config.json is {tokenizer.model_max_length!r}, "
                    "expected a number"
                )
            if not tokenizer.chat_template:
                tokenizer.chat_template = _template_of_processor(locate(config.path), config.revision)
            attach(tokenizer, MediaProcessor(locate(config.path), config.revision, tokenizer, config.limits))
            return tokenizer
        except LowrankError:
            raise
        except Exception as error:  # whatever transformers and tokenizers make of somebody's files
            raise ModelError(cannot_load("the tokenizer", config, error)) from error


def _template_of_processor(path: str, revision: str | None) -> str | None:
    """The chat template of a model that sees pictures, which older files keep with its processor (LLaVA, Idefics3)."""
    place = cached_file(path, "chat_template.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    own = read_json(Path(place)).get("chat_template") if place else None
    return own if isinstance(own, str) else None


def _configuration_of(folder: Path) -> dict[str, Any]:
    """What spares transformers the configuration's own class, whose import takes seconds: where the tokenizer's class
    stands in its file, of the model no more is asked than what config.json says (transformers' own way for a folder
    whose class it cannot find)."""
    try:
        model, tokenizer = (read_json(folder / name) for name in ("config.json", "tokenizer_config.json"))
    except ModelError:
        return {}
    own_code = "auto_map" in model or "auto_map" in tokenizer
    if own_code or not isinstance(tokenizer.get("tokenizer_class"), str) or not (folder / "tokenizer.json").is_file():
        return {}
    if not isinstance(model.get("model_type"), str) or model["model_type"] not in transformers.CONFIG_MAPPING:
        return {}
    values = {name: value for name, value in model.items() if "rope" not in name}  # which wants the class' own defaults
    try:
        return {"config": transformers.PreTrainedConfig.from_dict({**values, "_name_or_path": str(folder)})}
    except Exception as error:  # whatever transformers makes of somebody's file
        raise ModelError(f"{folder / 'config.json'}: {reason_of(error, model)}") from error


def reason_of(error: Exception, settings: Mapping[str, Any]) -> str:
    """The first sentence of what transformers says of a model's files. `settings`: in its config.json, to tell where a
    name stands that nobody knows."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if first.endswith(":") and rest:  # what is wrong stands below where
        first = f"{first} {rest[0]}"
    if isinstance(error, KeyError) and error.args:
        known_as = [key for key, value in _flat(settings) if value == error.args[0]]
        places = f" ({', '.join(known_as)} in config.json)" if known_as else ""
        first = f"transformers does not know {error.args[0]!r}{places}"
    return first[:300]


def _flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and not path:
            yield from _flat(value, f"{key}.")
        yield f"{path}{key}", value


def cannot_load(what: str, config: ModelConfig, error: Exception) -> str:
    """Why something of a model cannot be had, with the way out where there is one."""
    folder = Path(locate(config.path))
    reason = reason_of(error, find_json(folder / "config.json") or {})
    hints = []
    if not folder.exists():
        hints.append("no such folder here; if it is a hub name, check the spelling")
    if isinstance(error, SafetensorError):
        hints.append("a weight file is damaged or was not downloaded to its end: get it again")
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        hints.append(
            "it comes with its own Python code: read it, then set model.trust_remote_code: true and add --allow-code"
        )
    return "\n  ".join([f"cannot load {what} of {config.path!r}: {reason}", *hints])

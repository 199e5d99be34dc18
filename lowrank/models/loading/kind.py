"""What a path given as a model is, told from names and config.json, before anything is loaded.

Trained is a causal language model in transformers' layout: a folder with config.json, a tokenizer and safetensors.
Everything else that people give is recognized by its kind, and the sentence says which command takes it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as ENCODER_DECODER,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES as SPEECH,
)

from lowrank.errors import ModelError, raise_all
from lowrank.foreign_files import check_folder, read_json
from lowrank.models.config_numbers import check_numbers
from lowrank.models.loading.model_class import CAUSAL, has_language_model, names_own_code

_KERNELS = (
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal",
)  # fmt: skip
"""Settings that transformers lets name a kernel by its repository."""
_EXPECTED = (
    "lowrank takes causal language models (decoders that read left to right: Llama, Qwen, Mistral, Gemma, GPT-2 ..., "
    "also with a tower for pictures or sound beside them)"
)
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "spiece*")
_OF_FILES = {
    ".gguf": "a GGUF file, llama.cpp's form of a finished model: `lowrank serve` and `lowrank chat` answer with it. To "
    "train, give the folder or hub name of the model it was made from",
    ".yaml": "a file of settings: `lowrank train {path}` runs it",
    ".yml": "a file of settings: `lowrank train {path}` runs it",
    ".bin": "a file of pickled weights, which lowrank does not open: give a folder with safetensors, a tokenizer and "
    "config.json",
}


def check_path(path: str) -> None:
    """ModelError for a file, or a folder that holds something else than a model, saying what it is and what takes it.
    Hub names, and folders that may be models, pass."""
    place = Path(path)
    if not place.exists():
        return
    if not place.is_dir():
        raise ModelError(f"{path} is {_describe_file(place)}")
    if not os.path.lexists(place / "config.json"):
        raise ModelError(f"{path} {_without_config(place)}")
    check_folder(place)
    config = read_json(place / "config.json", hint="; get this file again")
    if config.keys() >= {"model", "output_dir"} and "model_type" not in config:
        raise ModelError(
            f"{path} is a run folder of lowrank, not a model: `lowrank chat {path}` and `lowrank export {path}` take "
            "it; to train on, give the same base as model and an adapter of the run as adapter.path"
        )
    check_numbers(config, str(place / "config.json"))
    refuse_kernels(config, str(place / "config.json"))
    _check_type(path, config)


def refuse_kernels(settings: Mapping[str, Any], where: str) -> None:
    """ModelError where a configuration (`where`) names a kernel of the hub: transformers would fetch compiled code and
    run it, which nobody asked for."""
    named = [
        f"{key}: {value}"
        for part in (settings, *(each for each in settings.values() if isinstance(each, Mapping)))
        for key in _KERNELS
        for value in _texts(part.get(key))
        if "/" in value
    ]
    problems = [f"{each}: code from the hub; take that line out, lowrank chooses the implementation" for each in named]
    raise_all(ModelError, f"{where}: what a file says runs no code", problems)


def _texts(value: Any) -> list[str]:
    each = value.values() if isinstance(value, Mapping) else [value]
    return [text for text in each if isinstance(text, str)]


def check_tokenizer(path: str) -> None:
    """ModelError for a model's folder without a tokenizer."""
    place = Path(path)
    if not place.is_dir() or any(any(place.glob(pattern)) for pattern in _TOKENIZER):
        return
    config = _json(place / "config.json") or {}
    if "auto_map" in config:  # its own code may make one
        return
    origin = config.get("_name_or_path") or "NAME-OF-THE-ORIGINAL"
    raise ModelError(
        f"{path} holds a model without its tokenizer (tokenizer.json and tokenizer_config.json): copy these files from "
        "the model it was made from, as by AutoTokenizer.from_pretrained"
        f"({origin!r}).save_pretrained({path!r})"
    )


def check_weights(path: str) -> None:
    """ModelError for a model's folder without safetensors."""
    place = Path(path)
    if not place.is_dir() or any(place.glob("*.safetensors")) or (place / "model.safetensors.index.json").is_file():
        return
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in place.glob(pattern))
    if pickles:
        raise ModelError(
            f"{path}: it has only pickled .bin weights, which can run code when they are opened, so lowrank does not "
            f"({', '.join(pickles[:3])}): convert them to safetensors (AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(...), if you trust them), or get a copy that has them"
        )
    raise ModelError(
        f"{path} has a config.json and no weights: model.safetensors, or its shards with their index, are missing. Get "
        "the rest of the model's files into this folder, or give another"
    )


def check_causal(config: Any, path: str) -> None:
    """ModelError for a configuration (transformers') of a model that does not write left to right."""
    kind, classes = config.model_type, ", ".join(getattr(config, "architectures", None) or [])
    named = f"{path} is {'of type ' + repr(kind)}{f' ({classes})' if classes else ''}"
    if names_own_code(config):
        return
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{named}, an encoder-decoder: it answers an encoded input, not the text before; {_EXPECTED}")
    if kind in MASKED:
        what = "a decoder of an encoder's family, whose head is more than one matrix"
        if not getattr(config, "is_decoder", False):
            what = "an encoder: every token sees the whole text, so it fills gaps and does not write"
        raise ModelError(f"{named}, {what}; {_EXPECTED}")
    if not has_language_model(config):
        raise ModelError(f"{named}, for which transformers has no causal language model; {_EXPECTED}")


def plainly_causal(path: str) -> bool:
    """Whether a folder's config.json alone says that it is a causal language model of transformers' own, so that the
    class of its configuration need not be asked: to import it takes seconds (of Llama: torch.distributed, sympy)."""
    config = _json(Path(path) / "config.json") or {}
    kind = config.get("model_type")
    if not isinstance(kind, str) or "auto_map" in config or config.get("is_encoder_decoder"):
        return False
    return kind in CAUSAL and not any(kind in others for others in (MASKED, ENCODER_DECODER, SPEECH))


def _check_type(path: str, config: dict[str, Any]) -> None:
    """ModelError for a type that this transformers does not know and that brings no code."""
    kind = config.get("model_type")
    known = isinstance(kind, str) and kind in transformers.CONFIG_MAPPING
    if "auto_map" in config or known:
        return
    if not isinstance(kind, str) or not kind:
        raise ModelError(f"{path}: its config.json has no model_type, so nobody can tell what to make of its weights")
    raise ModelError(
        f"{path} is of type {kind!r}, which the installed transformers ({transformers.__version__}) does not know, and "
        "it brings no code of its own. If the model is newer than that, `pip install -U transformers`; if the name is "
        "a slip, mend model_type in its config.json"
    )


def _describe_file(place: Path) -> str:
    if place.suffix == ".safetensors":
        folder = place.parent
        if (folder / "adapter_config.json").is_file():
            return f"the weights of an adapter; give its base as model and {folder} as adapter.path"
        return f"one file of weights; give the folder with its config.json and tokenizer: {folder}"
    if place.suffix == ".json":
        if place.name in ("config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json"):
            return f"one file of a model; give its folder: {place.parent}"
        return f"a JSON file: if it holds settings, `lowrank train {place}` runs it; as model give a folder or hub name"
    described = _OF_FILES.get(
        place.suffix, "a file; a model is a folder (config.json, a tokenizer, safetensors) or hub name"
    )
    return described.format(path=place)


def _without_config(place: Path) -> str:
    if (place / "adapter_config.json").is_file():
        base = (_json(place / "adapter_config.json") or {}).get("base_model_name_or_path") or "its base"
        return f"is an adapter, not a model: train on with model={base} adapter.path={place}"
    files = sorted(place.glob("*.gguf"))
    if files:
        return f"holds GGUF files and no config.json; `lowrank serve {files[0]}` answers with one of them"
    inner = sorted(each.parent.name for each in place.glob("*/config.json"))
    also = f"; there is one in {', '.join(inner[:4])}, inside it" if inner else ""
    return f"has no config.json, so it is no model's folder{also}"


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except ModelError:
        return None

"""A model's own processor, as transformers has it for that family, with no more of it than its media need here.

Most families' processors also want one for videos, which wants torchvision. What pictures and sounds need of them runs
on Pillow and numpy alone, so that one is left out until there are videos: no line here is of one family.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Collection, Generator, Mapping
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.processing_auto import (
    PROCESSOR_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
    processor_class_from_name,
)
from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import DummyObject

from lowrank.errors import ModelError, first_line
from lowrank.media.torchvision import torchvision_problem
from lowrank.records import KIND_NAMES

PARTS = {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}
"""What processors call the part that makes a kind of medium ready."""


class _SomeParts(ProcessorMixin):
    """Comes between a family's processor and transformers' own, and takes out what is not there."""

    present: Collection[str] = ()

    @classmethod
    def get_attributes(cls) -> list[str]:
        """See ProcessorMixin."""
        return [name for name in super().get_attributes() if name in cls.present]

    def __init__(self, *given: Any, **named: Any) -> None:
        order = ProcessorMixin.get_attributes.__func__(type(self))  # type: ignore[attr-defined]  # of the whole family
        named.update(zip(order, given))
        others = [name for name in order if name not in self.present]
        super().__init__(**{name: value for name, value in named.items() if name not in others})
        for name in others:
            setattr(self, name, None)


def make_processor(family: Any, parts: Mapping[str, Any], tokenizer: Any, **settings: Any) -> Any:
    """A processor of a family's class, made of a tokenizer and `parts` by the names in PARTS. Of both and of `settings`
    it takes those that it knows."""
    taken = inspect.signature(family.__init__).parameters
    own = {key: value for key, value in settings.items() if key in taken and not _is_part(key)}
    others = {name: None for name in taken if _is_part(name)}
    given = {name: part for name, part in parts.items() if name in taken} | {"tokenizer": tokenizer}
    some = type(family.__name__, (family, _SomeParts), {"__module__": family.__module__, "present": tuple(given)})
    with _framing_as_before(tokenizer):
        return some(**{**others, **own, **given})


@contextlib.contextmanager
def _framing_as_before(tokenizer: Any) -> Generator[None]:
    """Some processors let the tokenizer they are given put no BOS before a text any more (PaliGemma's), which texts
    without media still want."""
    names = ("add_bos_token", "add_eos_token")
    before = {name: getattr(tokenizer, name, None) for name in names}
    framing = tokenizer.backend_tokenizer.post_processor
    yield
    for name, value in before.items():
        if getattr(tokenizer, name, None) != value:
            setattr(tokenizer, name, value)
    if framing is not None:
        tokenizer.backend_tokenizer.post_processor = framing


def class_named(name: str | None) -> Any:
    """transformers' class of this name; also one that it hides where torchvision, which it wants for films, is not
    installed."""
    places = [kind for kind, each in PROCESSOR_MAPPING_NAMES.items() if each == name]
    if name is None or not places:
        return None
    found = processor_class_from_name(name)
    if found is not None and not isinstance(found, DummyObject):
        return found
    for place in dict.fromkeys(map(model_type_to_module_name, places)):
        with contextlib.suppress(ImportError):
            return getattr(importlib.import_module(f"transformers.models.{place}.processing_{place}"), name)
    return None


def load_processor(
    path: str, revision: str | None, tokenizer: Any, kinds: Collection[str] = ("image",), model_type: str | None = None
) -> Any:
    """transformers' processor for the checkpoint at `path`, with this tokenizer, what `kinds` of media need, and Pillow
    as its backend.

    ModelError where there is none, it brings code of its own, or cannot be made.
    """
    where = {"revision": revision}
    try:
        settings, _ = ProcessorMixin.get_processor_dict(path, **where)
    except OSError:
        settings = {}
    try:
        found = class_named(settings.get("processor_class") or PROCESSOR_MAPPING_NAMES.get(model_type or ""))
        if found is None:
            raise ModelError(
                f"{path}: the processor of {_names(kinds)} of models of type {model_type!r} is not to be had here: the "
                "installed transformers has none, or only with torchvision, which is not installed (`pip install "
                "torchvision`, the build that fits your torch)"
            )
        parts = {PARTS[kind]: _load_part(kind, path, where) for kind in kinds}
        return make_processor(found, parts, tokenizer, **settings)
    except ModelError:
        raise
    except Exception as error:  # whatever transformers makes of somebody's files
        raise ModelError(
            f"{path}: its processor of {_names(kinds)} cannot be made: {first_line(error, 300)}. {_way_out(error)}"
        ) from error


def _way_out(error: Exception) -> str:
    problem = torchvision_problem()
    if problem is not None and "torchvision" in str(error).lower():  # families that transformers has on it alone
        return f"{problem[0].upper()}{problem[1:]}: `pip install torchvision`, the build that fits your torch"
    files = "preprocessor_config.json and processor_config.json"
    return f"Its files are {files}; get them again from where the model is from"


def _load_part(kind: str, path: str, where: Mapping[str, Any]) -> Any:
    if kind == "video":
        return transformers.AutoVideoProcessor.from_pretrained(path, trust_remote_code=False, **where)
    if kind == "audio":
        return transformers.AutoFeatureExtractor.from_pretrained(path, trust_remote_code=False, **where)
    return transformers.AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False, **where)


def _names(kinds: Collection[str]) -> str:
    return " and ".join(KIND_NAMES[kind] for kind in kinds)


def _is_part(name: str) -> bool:
    return name in ("tokenizer", *PARTS.values()) or name.endswith(("_processor", "_extractor"))

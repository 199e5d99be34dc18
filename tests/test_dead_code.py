"""Nothing in the package is unused: a check that nobody calls is worse than none, since its tests say it is there.

vulture looks at the package alone, so what only tests call counts as unused. Fields and local names are pydantic's,
typer's and ruff's business; here are functions, classes, methods and properties.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest
from peft import LoraModel, PeftModel
from transformers import PreTrainedModel
from vulture import Vulture

import lowrank

PACKAGE = Path(lowrank.__file__).parent
DECORATED = [
    "@app.*",
    "@router.*",
    "@field_validator",
    "@model_validator",
    "@field_serializer",
    "@model_serializer",
    "@triton.jit",
]

CALLED_BY_OTHERS = {
    "cli/*.py": "commands, found by their file's name",
    "contrib/commands/*.py": "commands as well",
    "data/chat/template_sandbox.py": "jinja's interface of a code generator",
    "data/formats*": "formats, found by their name",
    "evaluate/harness.py": "lm-eval's interface of a model",
    "models/*checkpoint_files.py": "safetensors' interface of a slice",
    "models/*quantize_on_load.py": "transformers' interface of a quantizer",
    "__init__.py": "the interpreter and inspect: hooks of a module",
}
"""Files whose functions and methods are called from outside, and by whom."""

UNSLOTH_NAMES = {
    "for_inference", "for_training", "fast_generate", "load_lora", "save_pretrained_merged", "save_pretrained_gguf",
    "save_pretrained_torchao", "push_to_hub_merged", "push_to_hub_gguf",
}  # fmt: skip
"""What Unsloth puts on its classes and models, besides what PEFT's have."""


def offered(place: str, name: str) -> bool:
    """Whether people call it: a name of the package's face, or of a class there; of Unsloth's; or of the models of PEFT
    and transformers."""
    if place.startswith("api/"):
        faces = [getattr(lowrank, each) for each in lowrank.__all__]
        return name in lowrank.__all__ or any(name in vars(each) for each in faces if isinstance(each, type))
    if place.startswith("compat/unsloth/"):
        return name in UNSLOTH_NAMES or any(hasattr(model, name) for model in (PeftModel, LoraModel, PreTrainedModel))
    return False


def unused() -> dict[str, str]:
    """`{name: place}`."""
    tool = Vulture(ignore_names=["*Config"], ignore_decorators=DECORATED)  # settings are found by their file
    tool.scavenge([PACKAGE])
    return {
        item.name: f"{item.filename.relative_to(PACKAGE)}:{item.first_lineno}"
        for item in tool.get_unused_code(min_confidence=60)
        if item.typ in ("function", "class", "method", "property")
    }


def test_every_exception_is_of_a_file() -> None:
    places = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")]
    assert [file for file in CALLED_BY_OTHERS if not any(fnmatch(place, file) for place in places)] == []


def test_nothing_is_unused() -> None:
    found = {
        name: place
        for name, place in unused().items()
        if not any(fnmatch(place.rsplit(":")[0], file) for file in CALLED_BY_OTHERS)
    }
    assert {f"{place} {name}" for name, place in found.items() if not offered(place, name)} == set()


@pytest.mark.parametrize(
    ("place", "name", "is_offered"),
    [
        ("api/live.py:1", "LiveRun", True),
        ("api/training.py:1", "metrics", True),  # of TrainedRun
        ("api/training.py:1", "forgotten", False),
        ("compat/unsloth/model.py:1", "get_base_model", True),  # of PEFT's
        ("compat/unsloth/model.py:1", "load_lora", True),
        ("compat/unsloth/model.py:1", "forgotten", False),
        ("train/engine.py:1", "LiveRun", False),
    ],
)
def test_only_what_is_offered_may_lack_a_caller(place: str, name: str, is_offered: bool) -> None:
    assert offered(place, name) == is_offered

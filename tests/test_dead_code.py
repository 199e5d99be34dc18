"""Nothing in the package is unused: a check that nobody calls is worse than none, since its tests say it is there.

vulture looks at the package alone, so what only tests call counts as unused. Fields and local names are pydantic's,
typer's and ruff's business; here are functions, classes, methods and properties.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

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
    "compat/unsloth/*": "Unsloth's interface, and PEFT's",
    "models/*streaming.py": "transformers' interface of a quantizer",
    "models/*checkpoint_files.py": "safetensors' interface of a slice",
    "models/*quantize_on_load.py": "transformers' interface of a quantizer",
    "__init__.py": "the interpreter and inspect: hooks of a module",
    "api/*": "whoever imports lowrank",
}
"""Files whose functions and methods are called from outside, and by whom."""

WAITING = {
    "bytes_per_token": "only tests",
    "release_scratch": "only tests, which measure what it gives back",
    "checkpoints": "RunFolder's, only tests",
    "transcript": "only tests",
    "static": "StepBytes's, only tests: what is alive between steps, beside measured peaks",
    "Ordering": "says what requests offer; nothing is annotated with it yet",
}
"""Single names that are known to be unused. Shorten this list, don't lengthen it."""


def unused() -> dict[str, str]:
    """`{name: place}`."""
    tool = Vulture(ignore_names=["*Config"], ignore_decorators=DECORATED)  # settings are found by their file
    tool.scavenge([PACKAGE])
    return {
        item.name: f"{item.filename.relative_to(PACKAGE)}:{item.first_lineno}"
        for item in tool.get_unused_code(min_confidence=60)
        if item.typ in ("function", "class", "method", "property")
    }


def test_nothing_is_unused() -> None:
    found = {
        name: place
        for name, place in unused().items()
        if not any(fnmatch(place.rsplit(":")[0], file) for file in CALLED_BY_OTHERS)
    }
    assert {f"{place} {name}" for name, place in found.items() if name not in WAITING} == set()

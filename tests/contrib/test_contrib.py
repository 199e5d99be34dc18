"""Contrib stays behind its seams."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank
from lowrank.contrib.commands import COMMANDS
from lowrank.models.layer_wrappers import LayerWrapperConfig
from lowrank.settings import configs_in

ROOT = Path(lowrank.__file__).parent
RENAMED = {ROOT / "renamed.py"}
"""Old names of settings stand there, with the new ones."""


def test_the_core_mentions_none_of_it() -> None:
    names = [*configs_in("lowrank.contrib.layer_wrappers"), *COMMANDS]
    mention = re.compile("|".join(names))
    compat = set(ROOT.glob("compat/**/*.py"))  # settings of other programs, which have their own names
    core = {path for path in ROOT.rglob("*.py") if "contrib" not in path.parts} - RENAMED - compat
    assert not [str(path) for path in core if mention.search(path.read_text("utf-8"))]


def test_settings_are_read_without_loading_a_model() -> None:
    code = "import lowrank.models.layer_wrappers, sys; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("kind", configs_in("lowrank.contrib.layer_wrappers").values())
def test_a_layer_wrapper_says_what_it_is(kind: type[LayerWrapperConfig]) -> None:
    settings = kind()
    assert settings.title
    assert settings.parameters
    assert kind.model_validate(settings.saved) == settings

"""PEFT's warnings about its own prompts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _peft_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(encoder_num_layers|Position ids|past_key_values).*")
        yield

"""Tests whose facts are of newer releases of transformers and PEFT than the oldest that are supported."""

from __future__ import annotations

import peft
import pytest
import transformers
from packaging.version import Version


def since(release: str, why: str) -> pytest.MarkDecorator:
    """Skipped under an older transformers."""
    return pytest.mark.skipif(older(release), reason=f"transformers {release}: {why}")


def older(release: str) -> bool:
    """Whether transformers is."""
    return Version(transformers.__version__) < Version(release)


def since_peft(release: str, why: str) -> pytest.MarkDecorator:
    """Skipped under an older PEFT."""
    return pytest.mark.skipif(Version(peft.__version__) < Version(release), reason=f"PEFT {release}: {why}")

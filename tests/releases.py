"""Tests whose facts are of newer releases of transformers than the oldest that is supported."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version


def since(release: str, why: str) -> pytest.MarkDecorator:
    """Skipped under an older transformers."""
    return pytest.mark.skipif(
        Version(transformers.__version__) < Version(release), reason=f"transformers {release}: {why}"
    )

"""matplotlib for files alone: imported without the backend that a notebook's kernel names for its own process.

`MPLBACKEND` is inherited by whatever a notebook starts (`!lowrank train`), where the package it names need not be
installed; matplotlib then cannot even be imported. Our plots go to files by Agg canvases of their own and need no
backend. Import this before matplotlib.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

_named = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib

    if _named is not None:
        settings: Any = matplotlib.rcParams
        with contextlib.suppress(ValueError):  # what this process draws elsewhere is as its owner asked, if that works
            settings["backend"] = _named
finally:
    if _named is not None:
        os.environ["MPLBACKEND"] = _named

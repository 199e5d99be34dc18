"""torchvision's wheel on PyPI is compiled for CUDA and refuses to be imported beside a torch that is not, for want of
two operators. Tests of videos need its Python alone, where the resizing is; so that they can run in such a place too,
the operators are declared there. Imported before transformers, which looks for torchvision at once."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []
"""Declarations last as long as what made them."""

if importlib.util.find_spec("torchvision") is not None:
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}{_SIGNATURE}")
        _declared.append(library)

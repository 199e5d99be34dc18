"""The adapter alone, in PEFT's layout: for PEFT, vLLM's and others' adapter loading, and for lowrank itself.

Bottleneck adapters, which PEFT does not have, in the layout of AdapterHub's library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from lowrank.adapters.bottleneck import BottleneckSettings
from lowrank.checkpoints.model_card import loading_code
from lowrank.checkpoints.peft_config import describe_base, left_out_by_vllm, peft_incompatibility
from lowrank.checkpoints.peft_layout import AdapterOnDisk, load_adapter, write_adapter
from lowrank.errors import ModelError, raise_all
from lowrank.export import ExportProgress, Needs, ReadBack, Tolerance
from lowrank.export.merge.tensor_names import Names
from lowrank.export.merge.weights import Weights
from lowrank.export.source import Source
from lowrank.export.verify.readers import read_adapter
from lowrank.export.writing.side_files import write_tokenizer
from lowrank.settings import Settings

TOLERANCES = {
    "float32": Tolerance(mean_kl=1e-9, top1_agreement=1.0, perplexity=1e-6),
    "float16": Tolerance(mean_kl=1e-4, top1_agreement=0.99, perplexity=1e-3),
    "bfloat16": Tolerance(mean_kl=1e-3, top1_agreement=0.98, perplexity=5e-3),
}
_USAGE = """```python
{code}
```

Or, without {library}: `lowrank chat {path}`."""


class PeftExportConfig(Settings):
    """The adapter alone, in PEFT's layout."""

    type: Literal["peft"] = "peft"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the adapter's tensors are written in."""

    def build(self) -> PeftTarget:
        """A `PeftTarget`, with these settings; nothing is written before `write`."""
        return PeftTarget(self)


class PeftTarget:
    """See the module."""

    def __init__(self, config: PeftExportConfig) -> None:
        self.config = config
        self.dtype: torch.dtype = getattr(torch, config.dtype)

    def needs(self, source: Source) -> Needs:
        """The size of the adapter."""
        adapter = _adapter(source)
        problems = _names(source).refusals(adapter) if adapter.config.unmergeable is None else []
        raise_all(ModelError, f"{source.name}: this adapter does not fit its base", problems)
        size = sum(tensor.numel() for tensor in adapter.tensors.values()) * self.dtype.itemsize
        return Needs(size + (64 << 20), 2 * size)

    def write(self, source: Source, folder: Path, progress: ExportProgress) -> Sequence[str]:
        """adapter_config.json, adapter_model.safetensors, a card, the tokenizer with the template training used."""
        adapter = _adapter(source)
        base = describe_base(_names(source).model, source.model.path, source.model.revision)
        write_adapter(folder, adapter, base, dtype=self.dtype)
        size = sum(tensor.numel() for tensor in adapter.tensors.values())
        problem = peft_incompatibility(base, adapter.targets, adapter.config.peft)
        write_tokenizer(source, folder)
        progress(1, 1)
        return tuple(filter(None, [f"{size:,} parameters of a {adapter.config.title} adapter", problem]))

    def read_back(self, source: Source, folder: Path) -> Sequence[ReadBack]:
        """The adapter as a user loads it again, on the base."""
        tolerance = TOLERANCES[self.config.dtype]
        return (
            ReadBack(
                "peft",
                tolerance,
                lambda: read_adapter(source, load_adapter(folder)),
                compares_images=source.supports_images,
            ),
        )

    def usage(self, source: Source, path: str) -> str:
        """With PEFT, or with AdapterHub's library, on the base."""
        config = _adapter(source).config
        library = "adapters" if isinstance(config, BottleneckSettings) else "PEFT"
        described = describe_base(_names(source).model, source.model.path, source.model.revision)
        code = loading_code(config, source.hub_base or "path/of/the/base", path, described)
        vllm = left_out_by_vllm(described, _adapter(source).targets)
        return _USAGE.format(path=path, code=code, library=library) + (f"\n\n{vllm}." if vllm else "")


def _adapter(source: Source) -> AdapterOnDisk:
    if source.adapter is None:
        raise ModelError(f"{source.name} is a whole model, there is no adapter to write; export --to merged")
    return source.adapter


def _names(source: Source) -> Names:
    return Names(source.base, Weights(source.base), trust_remote_code=source.model.runs_own_code)

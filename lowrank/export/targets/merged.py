"""The adapter merged into its base: a model in transformers' layout, which vLLM, TGI, llama.cpp and others read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator

from lowrank.export import ExportProgress, Needs, ReadBack, Tolerance
from lowrank.export.merge.merged import Merged
from lowrank.export.publish.usage_example import TO_A_SERVER, usage_code
from lowrank.export.source import Source
from lowrank.export.verify.readers import read_model
from lowrank.export.writing.shards import Layout, lay_out, write_shards
from lowrank.export.writing.side_files import write_side_files
from lowrank.export.writing.sizes import format_size, parse_size
from lowrank.models.loading.checkpoint_files import BLOCK_BYTES
from lowrank.settings import Settings

_WIDER = (
    "write it with dtype=float32: an update that moved the weights little is lost where they are rounded to 16 bits"
)
TOLERANCES = {
    torch.float32: Tolerance(mean_kl=1e-6, top1_agreement=0.999, perplexity=1e-4),
    torch.float16: Tolerance(mean_kl=2e-3, top1_agreement=0.98, perplexity=5e-3, remedy=_WIDER),
    torch.bfloat16: Tolerance(mean_kl=1e-2, top1_agreement=0.95, perplexity=2e-2, remedy=_WIDER),
}
"""By the dtype of the merged weights: what rounding them may do. Both sides are computed in the same dtype."""
_COPIES = 4
"""Of the largest tensor, in float32, in memory where an update needs the whole of it."""
_USAGE = """```python
{usage_example}
```

Or served: `vllm serve {path}`, `lowrank chat {path}`."""


def _size(value: str) -> str:
    parse_size(value)
    return value


class MergedExportConfig(Settings):
    """The whole model, in transformers' layout."""

    type: Literal["merged"] = "merged"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the weights are written in; auto: what the base's files have."""
    max_shard_size: Annotated[str, AfterValidator(_size)] = "5GB"
    """Size of one weight file at the most, e.g. 500MB or 5GB."""

    def build(self) -> MergedTarget:
        """A `MergedTarget`, with these settings; nothing is written before `write`."""
        return MergedTarget(self)


class MergedTarget:
    """See the module."""

    def __init__(self, config: MergedExportConfig) -> None:
        self.config = config
        self.dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        self._planned: tuple[Source, Merged] | None = None

    def needs(self, source: Source) -> Needs:
        """The size of the weights on disk; in memory a few blocks, or a few copies of one tensor."""
        merged, layout = self._plan(source)
        whole = [plan for plan in merged.values() if plan.change is not None and not plan.change.by_rows]
        largest = max((torch.Size(plan.shape).numel() * 4 for plan in whole), default=0)
        return Needs(
            layout.total_bytes + (64 << 20), max(_COPIES * largest, 8 * BLOCK_BYTES), (_describe(source, merged),)
        )

    def write(self, source: Source, folder: Path, progress: ExportProgress) -> Sequence[str]:
        """Weights, configuration, tokenizer, template."""
        merged, layout = self._plan(source)
        write_shards(merged, layout, self.dtype, folder, progress)
        write_side_files(source, folder, dtype=self.dtype, untied=merged.untied)
        files = f"{len(layout.files)} files" if len(layout.files) > 1 else "one file"
        return (f"{format_size(layout.total_bytes)} of weights in {files}",)

    def read_back(self, source: Source, folder: Path) -> Sequence[ReadBack]:
        """The folder as transformers loads it."""
        written = self.dtype or _base_dtype(self._merged(source))
        return (
            ReadBack(
                "merged",
                TOLERANCES[written],
                lambda: read_model(source, folder),
                compares_images=source.supports_images,
            ),
        )

    def usage(self, source: Source, path: str) -> str:
        """With transformers and with vLLM."""
        shown = TO_A_SERVER if source.supports_images else ""
        return _USAGE.format(usage_example=usage_code(source.base, path), path=path) + shown

    def _merged(self, source: Source) -> Merged:
        """Planned once for the checks, the writing and the reading back."""
        if (
            self._planned is None
            or self._planned[0].base != source.base
            or self._planned[0].adapter is not source.adapter
        ):
            self._planned = source, Merged(source)
        return self._planned[1]

    def _plan(self, source: Source) -> tuple[Merged, Layout]:
        merged = self._merged(source)
        return merged, lay_out(merged, self.dtype, parse_size(self.config.max_shard_size))


def _base_dtype(merged: Merged) -> torch.dtype:
    """The coarsest dtype of the weights, which decides how much rounding there is."""
    found = {plan.dtype for plan in merged.values() if len(plan.shape) > 1}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in found), torch.float32)


def _describe(source: Source, merged: Merged) -> str:
    quantized = merged.checkpoint.method
    if source.adapter is None:
        done = f"unpacked from {quantized}" if quantized else "copied as they are"
        return f"there is no adapter: the weights are {done}"
    dtype = str(_base_dtype(merged)).removeprefix("torch.")
    kept = source.model.storage.type
    also = f" (training kept them in {kept})" if kept != "dense" else ""
    untied = "; embedding and head, one tensor in the base, become two" if merged.untied else ""
    if quantized:
        return (
            f"merged in float32 into the {quantized} weights as they unpack, since the base's files hold no others; "
            f"written in {dtype}{untied}"
        )
    return f"merged in float32 from the original {dtype} weights{also}{untied}"

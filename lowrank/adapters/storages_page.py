"""docs/storages.md, made from what the storages do: `python -m lowrank.adapters.storages_page > docs/storages.md`."""

from __future__ import annotations

import torch

from lowrank.adapters.storage_capabilities import readers, storage_capabilities

HEAD = """# Storages: how the frozen base is kept

Made by `python -m lowrank.adapters.storages_page > docs/storages.md`; every line was found out by trying it, on a CPU
in float32, on a 512 x 512 matrix of normal weights. `lowrank doctor` tries the same on your machine and GPU.

*train*: the gradient is that of the dequantized weight, in training, after an evaluation, recomputed, with and without
adapters. *merge*: an adapter can be merged into the dequantized weight. *save*: `lowrank quantize` can write it (dense:
it is as it was). Bits are per weight, with scales, at default settings.

| `model.storage` | train | merge | save | bits | relative error |
|---|---|---|---|---|---|
"""
MIDDLE = """
Every linear layer of the backbone is packed, adapted or not, and so is every matrix of the experts of a mixture, each
by itself, where transformers describes their arithmetic (not Llama 4's, for one; a run says how many bytes stay).
The head, embeddings, tied weights, routers and what `storage.skip_modules` names (`experts`, for one) stay in the
run's dtype.

## Checkpoints that come quantized

Give the folder as `model` and leave `model.storage` out. config.json's `quant_method`:

| `quant_method` | |
|---|---|
"""


def page() -> str:
    """The page's markdown."""
    lines = [
        f"| {each.storage} | {_mark(each.train)} | {_mark(each.merge)} | {_mark(each.save)} | {each.bits:.1f} "
        f"| {each.relative_error:.3f} |"
        for each in storage_capabilities(torch.device("cpu"))
    ]
    return HEAD + "\n".join(lines) + "\n" + MIDDLE + "\n".join(_rows_of_readers()) + "\n"


def _rows_of_readers() -> list[str]:
    """A row for each format, with all the names it goes by."""
    names: dict[str, list[str]] = {}
    for method, summary in readers().items():
        names.setdefault(summary, []).append(f"`{method}`")
    return [f"| {', '.join(methods)} | {summary} |" for summary, methods in names.items()]


def _mark(ability: bool) -> str:
    return "yes" if ability else "no"


if __name__ == "__main__":
    print(page(), end="")

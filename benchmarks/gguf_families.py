"""How far llama.cpp is from transformers on a small random model of every family: the table of docs/gguf.md.

python -m benchmarks.gguf_families
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from lowrank.export.gguf.convert import convert
from lowrank.export.gguf.llama_cpp import LlamaCpp, squared_error
from lowrank.models.loading.quiet import quiet_transformers
from tests.export.gguf.families import FAMILIES, VOCABULARY, save


def main() -> None:
    """Print the table, a row as soon as it is measured."""
    print("| model | architecture in the file | NMSE of the logits | same likeliest token | bound in the tests |")
    print("|---|---|---|---|---|")
    for family, (_, bound) in FAMILIES.items():
        error, same, arch = measure(family)
        print(f"| {family} | {arch} | {error:.0e} | {same:.0%} | {bound:.0e} |", flush=True)


def measure(family: str) -> tuple[float, float, str]:
    """(normalized squared error, share of equal likeliest tokens, gguf's name of the architecture), on 64 tokens."""
    with tempfile.TemporaryDirectory() as name, quiet_transformers():
        folder = Path(name)
        model = save(family, folder)
        made = convert(folder, folder / "model.gguf", "f32")
        tokens = np.random.default_rng(0).integers(3, VOCABULARY - 40, 64).tolist()
        with torch.no_grad():
            wanted = model(torch.tensor([tokens])).logits[0].numpy()
        with LlamaCpp(folder / "model.gguf") as llama:
            got = llama.logits(tokens)
    return squared_error(got, wanted), float((got.argmax(1) == wanted.argmax(1)).mean()), made.family.arch


if __name__ == "__main__":
    main()

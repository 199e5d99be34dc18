"""What the training section measures."""

from __future__ import annotations

from dataclasses import dataclass

RANK = 16
LEARNING_RATE = 2e-4
STEPS = 3
"""Optimizer steps of one turn; the first is not counted."""


@dataclass(frozen=True)
class Cell:
    """One point of the table: `jobs` of `tokens` each in a step, in documents of at most `document` tokens."""

    shape: str
    storage: str
    jobs: int
    tokens: int
    document: int
    recompute: str = "none"
    peers: bool = False


CELLS = (
    Cell("0.5B", "dense", 1, 2048, 512, peers=True),
    Cell("Llama-3.1-8B", "dense", 1, 2048, 512, peers=True),
    Cell("Llama-3.1-8B", "nf4", 1, 2048, 512, peers=True),
    Cell("Llama-3.1-8B", "nf4", 8, 512, 512),
    Cell("Llama-3.1-8B", "nf4", 8, 2048, 512),
    Cell("Llama-3.1-8B", "dense", 8, 2048, 512),
    Cell("Llama-3.1-8B", "dense", 1, 8192, 8192, "selective", peers=True),
    Cell("Llama-3.1-8B", "nf4", 1, 32_768, 32_768, "full"),
    Cell("Llama-3.1-8B", "dense", 1, 512, 512),
    Cell("Qwen3-30B-A3B, 4 layers", "dense", 1, 4096, 512, peers=True),
    Cell("Qwen2.5-7B", "dense", 1, 2048, 512, peers=True),
    Cell("Qwen2.5-7B", "nf4", 8, 512, 512),
    Cell("0.5B", "dense", 8, 1024, 512),
)
"""The most telling first: what the time does not reach is left out."""

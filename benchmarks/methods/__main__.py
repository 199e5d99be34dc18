"""Writes docs/methods.md: every method, when to use it, what it costs, and how far it is from its peer.

    python -m benchmarks.methods > docs/methods.md

A few minutes on one core. New files of the folders that hold methods appear by themselves.
"""

from __future__ import annotations

import warnings

import torch

from benchmarks.methods import bottlenecks, modes, objectives, optimizers, prompts, variants


def main() -> None:
    """Print the page."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("# Methods\n\nWritten by `python -m benchmarks.methods > docs/methods.md`.\n")
    for section in (variants, prompts, bottlenecks, objectives, optimizers, modes):
        print(section.page(), end="")


if __name__ == "__main__":
    main()

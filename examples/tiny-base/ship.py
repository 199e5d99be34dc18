"""Put a trained base into the package: bfloat16 weights, and the tokenizer as tokenizer.py wrote it.

python examples/tiny-base/ship.py TRAINED_FOLDER UNTRAINED_FOLDER lowrank/models/tiny
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def ship(trained: Path, untrained: Path, out: Path) -> int:
    """Write the model; its size in bytes, all files together."""
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    model.save_pretrained(out)
    for name in TOKENIZER_FILES:
        shutil.copy(untrained / name, out / name)
    return sum(path.stat().st_size for path in out.iterdir() if path.is_file())


if __name__ == "__main__":
    print(f"{ship(*map(Path, sys.argv[1:4])):,} bytes")

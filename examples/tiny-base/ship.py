"""Put a pre-trained base into the package: bfloat16 weights and the tokenizer.

python examples/tiny-base/ship.py runs/tiny-base/default/last lowrank/models/tiny
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    print(f"{sum(file.stat().st_size for file in target.iterdir()) / 1e6:.1f} MB in {target}")

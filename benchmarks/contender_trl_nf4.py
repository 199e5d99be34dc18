"""TRL + PEFT on a base that bitsandbytes keeps in 4 bits, in a process of its own.

    python -m benchmarks.contender_trl_nf4 SPEC.json RESULT.json

With `evaluate` in the spec, a short evaluation pass comes before every training pass.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig

from benchmarks import contender_trl


def with_nf4(path: str, spec: dict[str, Any]) -> dict[str, Any]:
    """NF4 with double quantization, computing in bf16; adapters on every linear but the head."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="sdpa", quantization_config=quantization
    )
    if spec.get("evaluate"):
        model.register_forward_pre_hook(_evaluate_first)
    config = LoraConfig(r=spec["rank"], lora_alpha=2 * spec["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    return {"model": model, "peft_config": config}


def _evaluate_first(model: Any, args: Any) -> None:
    """Before a training pass: one evaluation pass, as between any two steps of a run that evaluates."""
    if model.training:
        model.eval()
        with torch.no_grad():
            model(input_ids=torch.arange(32)[None])
        model.train()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    found = contender_trl.main(json.loads(Path(sys.argv[1]).read_text()), with_nf4)
    Path(sys.argv[2]).write_text(json.dumps(found, default=str))

"""One run of Unsloth under TRL's SFTTrainer, on a GPU: `python -m benchmarks.contender_unsloth SPEC RESULT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from unsloth import FastLanguageModel  # before trl, transformers and peft, which it patches

from benchmarks import contender_trl

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_unsloth(path: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Its own model in bf16 with its own fused adapters, nothing recomputed."""
    model, _ = FastLanguageModel.from_pretrained(
        path, max_seq_length=spec["arguments"]["max_length"], dtype=torch.bfloat16, load_in_4bit=False
    )
    return {
        "model": FastLanguageModel.get_peft_model(
            model,
            r=spec["rank"],
            lora_alpha=2 * spec["rank"],
            lora_dropout=0.0,
            target_modules=TARGETS,
            use_gradient_checkpointing=False,
        )
    }


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(contender_trl.main(given, with_unsloth), default=str))

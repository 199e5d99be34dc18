"""What each device needs for 8B and 70B bases on 1 to 64 devices, and what travels: a table, made without either.

    python -m benchmarks.plans_of_devices [--write]

Llama 3's shapes, one LoRA of rank 16 on all linears, `--tokens` a device and optimizer step in one pass, layers
computed again (`activation_checkpointing: full`). Bytes are lowrank's own plans; seconds are bytes over a link at
its full speed. `--write` puts the table into docs/distributed.md and its Chinese twin.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import transformers

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.models.config import ModelConfig
from lowrank.objectives.sft import SFTConfig
from lowrank.planning.memory import StepMemory
from lowrank.planning.placed import REPLICATED, SHARDED, STREAMED, Placed
from lowrank.planning.simulation import PlannedJob
from lowrank.segments import Segment
from lowrank.train.optimizers.adamw import AdamWConfig

SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
DEVICES = (1, 2, 8, 64)
PER_MACHINE = 8
GPUS = (24, 48, 80)
"""GB of memory; 5 % of it is left for what a plan cannot know, and 0.8 GB for CUDA and NCCL."""
OF_THE_SYSTEM = 0.8e9
ROOT = Path(__file__).parent.parent
PAGES = {"docs/distributed.md": 0, "docs/distributed.zh-CN.md": 1}
BEGIN, END = "<!-- plans: made by benchmarks/plans_of_devices.py -->", "<!-- /plans -->"
HEADS = (
    "| base | devices | kept | GB a device | fits on | gradients, GB a step | base, GB a pass | GB of host memory |",
    "| 基座 | 设备数 | 存放方式 | 每块设备 GB | 可放入 | 梯度（每步 GB） | 基座（每次计算 GB） | 主机内存 GB |",
)


def memory_of(shape: str, storage: str, tokens: int, folder: Path) -> StepMemory:
    heads = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
    transformers.LlamaConfig(**SHAPES[shape], **heads, tie_word_embeddings=False).save_pretrained(folder)
    model = ModelConfig(path=str(folder), device="cpu", dtype="bfloat16", storage=storage)  # type: ignore[arg-type]
    lengths = [512] * (tokens // 512)
    segments = [Segment(np.ones(length, np.int64), np.ones(length, np.float32)) for length in lengths]
    return StepMemory(model, [PlannedJob(LoraConfig(rank=16), SFTConfig().build(), AdamWConfig(), segments)])


def rows(shape: str, storage: str, tokens: int) -> list[str]:
    with tempfile.TemporaryDirectory() as place:
        memory = memory_of(shape, storage, tokens, Path(place))
        gradients = memory.gradients(tokens, "full")
        found = []
        for devices in DEVICES:
            for base in (REPLICATED, SHARDED, STREAMED):
                local = min(devices, PER_MACHINE)
                if base == SHARDED and devices == 1:
                    continue
                placed = Placed(base, devices, local)
                step = memory.placed_as(placed).step(tokens, "full")
                total = step.total + OF_THE_SYSTEM
                fits = [f"{size}" for size in GPUS if total <= 0.95e9 * size]
                numbers = [
                    f"{total / 1e9:.1f}",
                    " ".join(fits) or "-",
                    f"{placed.sent_for_gradients(gradients) / 1e9:.2f}",
                    f"{placed.sent_for_base(memory.parts, 1) / 1e9:.0f}",
                    f"{placed.on_host(memory.parts) / 1e9:.0f}",
                ]
                found.append("| " + " | ".join([f"{shape} {storage}", str(devices), base, *numbers]) + " |")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines = [row for shape in SHAPES for storage in ("nf4", "dense") for row in rows(shape, storage, options.tokens)]
    for page, language in PAGES.items():
        table = "\n".join([HEADS[language], "|---|--:|---|--:|---|--:|--:|--:|", *lines])
        if options.write:
            text = (ROOT / page).read_text(encoding="utf-8")
            before, rest = text.split(BEGIN)
            (ROOT / page).write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
        elif not language:
            print(table)


if __name__ == "__main__":
    main()

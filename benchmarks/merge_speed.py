"""Merging an adapter against copying the files, and against PEFT's merge and save, in turns.

python -m benchmarks.merge_speed [--rounds 3] [--layers 24]

The model has the shape of Qwen2.5-0.5B with random bf16 weights, the adapter r=16 on all its linears. Each contender
has a process of its own and ends with its files on the disk (fsync). A copy is what a merge is at the very least: every
byte is read and written once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from benchmarks.machine import describe, load, median_of
from lowrank.adapters.targets import find_targets
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import AdapterOnDisk, save_adapter
from lowrank.export.merge.tensor_names import model_without_memory

SHAPE = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
_RANK = 16

_MEASURED = """
import os, sys, time
from pathlib import Path
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
{setup}
before = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
wall, cpu = time.perf_counter(), time.process_time()
{work}
for file in out.glob("*.safetensors"):
    with open(file, "rb+") as opened:
        os.fsync(opened)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
status = dict(line.split()[:2] for line in open("/proc/self/status") if line.startswith("Vm"))
print("RESULT", wall, cpu, int(status["VmHWM:"]) - before)
"""

CONTENDERS = {
    "copy": (
        "import shutil",
        "out.mkdir(); shutil.copyfile(folder / 'base/model.safetensors', out / 'model.safetensors')",
    ),
    "lowrank": (
        """
from lowrank.checkpoints.peft_layout import load_adapter
from lowrank.export.source import Source
from lowrank.export.targets.merged import MergedExportConfig
from lowrank.models.config import ModelConfig
""",
        """
model = ModelConfig(path=str(folder / "base"))
source = Source("it", folder / "base", model, load_adapter(folder / "adapter"), None, None)
target = MergedExportConfig().build()
target.needs(source)
out.mkdir()
target.write(source, out, lambda done, total, what="": None)
""",
    ),
    "peft": (
        "import peft, transformers, torch",
        """
base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload().save_pretrained(out)
""",
    ),
}


def make(folder: Path, layers: int, family: str = "Qwen2") -> int:
    """The base and the adapter on disk; bytes of the base."""
    (folder / "base").mkdir()
    config = getattr(transformers, f"{family}Config")(**SHAPE, num_hidden_layers=layers, dtype="bfloat16")
    config.save_pretrained(folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text())
    config["architectures"] = [f"{family}ForCausalLM"]
    (folder / "base" / "config.json").write_text(json.dumps(config))
    model = model_without_memory(folder / "base")
    shapes = {name: value.shape for name, value in model.state_dict().items() if name != "lm_head.weight"}
    weights = {name: 0.02 * torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    targets = find_targets(model, LoraConfig()).linears
    tensors = {}
    for name in targets:
        height, width = model.get_submodule(name).weight.shape
        tensors[f"{name}.lora_A.weight"] = 0.02 * torch.randn(_RANK, width)
        tensors[f"{name}.lora_B.weight"] = 0.02 * torch.randn(height, _RANK)
    adapter = AdapterOnDisk(LoraConfig(rank=_RANK), tensors, dict.fromkeys(targets, (_RANK, 2.0 * _RANK)))
    save_adapter(folder / "adapter", adapter, describe_base(model, str(folder / "base")))
    return (folder / "base" / "model.safetensors").stat().st_size


def measure(name: str, folder: Path) -> dict[str, float]:
    """Wall and processor seconds, and the growth of the resident memory."""
    setup, work = CONTENDERS[name]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        command = [sys.executable, "-c", _MEASURED.format(setup=setup, work=work), str(folder), f"{place}/out"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}:\n{done.stderr[-2000:]}")
    wall, cpu, memory = done.stdout.split("RESULT ")[1].split()
    return {"wall": float(wall), "cpu": float(cpu), "memory_bytes": 1024 * int(memory)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    loads = []
    with tempfile.TemporaryDirectory() as name:
        size = make(Path(name), arguments.layers)
        for _ in range(arguments.rounds):
            for contender in CONTENDERS:
                found[contender].append(measure(contender, Path(name)))
                loads.append(load())
    result: dict[str, Any] = {"machine": describe("cpu"), "bytes": size, "load": loads, "rounds": found}
    print(f"{size / 1e9:.2f} GB of bf16 weights, load {min(loads):.1f} to {max(loads):.1f}\n")
    print("| | wall s | MB/s | of the copy's speed | processor s | memory grows by |\n|---|---|---|---|---|---|")
    copy = median_of([each["wall"] for each in found["copy"]])
    for contender, rounds in found.items():
        wall, cpu, memory = (median_of([each[key] for each in rounds]) for key in ("wall", "cpu", "memory_bytes"))
        print(
            f"| {contender} | {wall:.2f} | {size / wall / 1e6:.0f} | {copy / wall:.0%} | {cpu:.2f} "
            f"| {memory / 1e6:.0f} MB |"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

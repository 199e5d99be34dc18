"""The others on the same weights: TRL and PEFT, over transformers' layers or bitsandbytes' in 4 bits."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_day.cells import LEARNING_RATE, RANK, STEPS, Cell
from benchmarks.gpu_day.day import Day
from benchmarks.gpu_day.shapes import sharing
from benchmarks.workload import Row
from lowrank.models.loading.pretrained import TINY, locate


def unsloth(day: Day) -> None:
    """Unsloth where it imports, in processes of their own, since it patches transformers: benchmarks/train_vs_trl.py on
    the 0.5B shape."""
    if not (day.device.is_gpu and importlib.util.find_spec("unsloth")):
        return
    found = in_processes(day, ["lowrank", "unsloth"], ["--device", "cuda"])
    day.add("processes", found)


def in_processes(day: Day, contenders: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
    """{contender: {"tokens_per_second", "peak_memory_bytes"}} of one round. Raises RuntimeError with its last words."""
    folder = day.folder / "in_processes"
    command = [sys.executable, "-m", "benchmarks.train_vs_trl", "--rounds", "1", "--steps", "3"]
    command += ["--results", str(folder), *arguments, "--contenders", *contenders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=day.left)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    (result,) = folder.glob("*.json")
    measured = json.loads(result.read_text())["contenders"]
    return {who: {key: measured[who][key] for key in ("tokens_per_second", "peak_memory_bytes")} for who in contenders}


def twin_of(model: Any, storage: str) -> Any:
    """A model over the weights of `model` for the others' adapters; None where they have no such storage here."""
    if storage == "dense":
        return sharing(model)
    if storage == "nf4" and importlib.util.find_spec("bitsandbytes"):
        return _in_4_bits(sharing(model))
    return None


def _in_4_bits(model: Any) -> Any:
    """NF4 with double quantization in the place of every linear layer but the head, as transformers loads QLoRA."""
    import bitsandbytes

    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or linear is model.get_output_embeddings():
            continue
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=model.dtype,
            quant_type="nf4", compress_statistics=True, device="meta",
        )  # fmt: skip
        packed.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        packed.bias = linear.bias
        model.set_submodule(name, packed.to(model.device))
    model.is_loaded_in_4bit = True
    return model


def again(twin: Any) -> Any:
    """The same weights for one more turn: each puts its adapters into the layers."""
    if not getattr(twin, "is_loaded_in_4bit", False):
        return sharing(twin)
    kept = [*twin.parameters(), *twin.buffers()]
    kept += [state for module in twin.modules() if (state := getattr(module, "quant_state", None)) is not None]
    return copy.deepcopy(twin, {id(each): each for each in kept})


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Afterwards the modules of transformers that the model's family is made of have the names they had: liger's patch
    of one model also puts its parts in the place of theirs, for every model made later."""
    family = type(model).__module__.rpartition(".")[0]
    spaces = [vars(module) for name, module in list(sys.modules.items()) if name.startswith(f"{family}.")]
    before = [dict(space) for space in spaces]
    try:
        yield
    finally:
        for space, names in zip(spaces, before):
            for name in set(space) - set(names):
                del space[name]
            space.update(names)


def theirs(day: Day, cell: Cell, twin: Any, rows: list[list[Row]], who: str) -> dict[str, Any]:
    """TRL's SFTTrainer with PEFT, packed, on the same steps (benchmarks/contender_trl.py); on what `again` gave."""
    from benchmarks import contender_trl

    if cell.jobs > 1:
        raise ValueError("TRL trains one adapter at a time")
    flat = [row for step in rows[:STEPS] for row in step]
    numbers, first = [], 0
    for step in rows[:STEPS]:
        numbers.append(list(range(first, first + len(step))))
        first += len(step)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(locate(TINY)) / file, folder / "model" / file)
        rows_json = {"source": "random", "rows": [vars(row) for row in flat]}
        (folder / "rows.json").write_text(json.dumps(rows_json))
        arguments = {
            "packing": True,
            "per_device_train_batch_size": 1,
            "gradient_checkpointing": cell.recompute != "none",
            "bf16": day.dtype == torch.bfloat16,
            "max_length": max(sum(len(row.tokens) for row in step) for step in rows),
        }
        if who == "trl_liger":
            arguments["use_liger_kernel"] = True
        spec = {
            "folder": name, "device": "cuda" if day.device.is_gpu else "cpu", "rank": RANK,
            "learning_rate": LEARNING_RATE, "steps": numbers, "packed": True, "arguments": arguments,
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = contender_trl.main(spec, lambda path, given: {**contender_trl.with_peft(path, given), "model": twin})
    return {"steps": made["steps"], "peak_memory_bytes": day.device.peak(), "config": made["config"]}

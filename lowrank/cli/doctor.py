"""`lowrank doctor`: what is installed, what the machine has, and what every storage does on it, found out by trying."""

from __future__ import annotations

import json as json_format
from typing import Annotated, Any

import typer


def doctor(json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """A storage is tried on every device there is, in float32 and in the dtype that a run takes there by itself: its
    gradient, also after an evaluation, its size and its error."""
    import torch
    from rich.table import Table

    from lowrank.adapters.storage_capabilities import as_json, readers, storage_capabilities
    from lowrank.kernels.accelerators import accelerators, unproven
    from lowrank.models.config import ModelConfig
    from lowrank.models.loading.pretrained import TINY, choose_dtype
    from lowrank.terminal import Console

    devices = [torch.device("cpu"), *accelerators()]
    facts = environment()
    run = ModelConfig(path=TINY)
    tried = {
        device.type: [
            each
            for dtype in dict.fromkeys([torch.float32, choose_dtype(run, device)])
            for each in storage_capabilities(device, dtype)
        ]
        for device in devices
    }
    if json:
        found = {device: as_json(each) for device, each in tried.items()}
        print(json_format.dumps({"environment": facts, "storages": found, "readers": dict(readers())}))
    else:
        console = Console(highlight=False)
        for name, fact in facts.items():
            console.print(f"{name:24s} {fact}")
        for device, capabilities in tried.items():
            table = Table(
                "storage", "dtype", "train", "merge", "save", "bits", "error", "", title=f"storages on {device}"
            )
            for each in capabilities:
                marks = ("yes" if ability else "no" for ability in (each.train, each.merge, each.save))
                table.add_row(
                    each.storage,
                    each.dtype,
                    *marks,
                    f"{each.bits:.2f}",
                    f"{each.relative_error:.2%}",
                    each.problem or "",
                )
            console.print(table)
        for device in devices:
            if notice := unproven(device):
                console.print(f"{device}: {notice}")
        console.print("checkpoints that come quantized: " + ", ".join(readers()))
    if not all(each.train for capabilities in tried.values() for each in capabilities):
        raise typer.Exit(1)


def environment() -> dict[str, Any]:
    """Versions, devices, and which way the kernels go here."""
    import importlib.metadata
    import os
    import platform

    import psutil
    import torch

    from lowrank import __version__
    from lowrank.kernels.accelerators import accelerators, name_of, processor_has_bf16, unproven
    from lowrank.kernels.cache_folder import cache_folder
    from lowrank.kernels.four_bit import dequantize_way, quantize_way

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    cpu, there = torch.device("cpu"), accelerators()
    facts = {
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "lowrank": __version__,
        "torch": torch.__version__,  # with its build, which the wheels of PyPI leave out of their name
        **{name: version(name) for name in ("transformers", "bitsandbytes", "triton", "peft")},
        "cores, threads": f"{os.cpu_count()}, {torch.get_num_threads()}",
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "bf16 in the processor": "yes" if processor_has_bf16() else "no",
        "GPU": ", ".join(map(name_of, there)) or "none that torch can use",
        "quantizes to 4 bits by": quantize_way(cpu),
        "dequantizes 4 bits by": dequantize_way(cpu, torch.bfloat16),
        "cache folder": str(cache_folder()),
    }
    for device in there:
        facts[f"dequantizes on {device} by"] = dequantize_way(device, torch.bfloat16)
        facts[f"not proven on {device}"] = unproven(device) or "nothing"
    return facts

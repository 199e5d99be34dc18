"""`lowrank doctor`: what is installed, what the machine has, and what every storage does on it, found out by trying."""

from __future__ import annotations

import json as json_format
from typing import Annotated, Any

import typer


def doctor(json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """A storage is tried on every device there is: its gradient, also after an evaluation, its size and its error."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from lowrank.adapters.capabilities import as_json, readers, storage_capabilities

    devices = [torch.device("cpu"), *(torch.device("cuda") for _ in range(torch.cuda.is_available()))]
    facts = environment()
    tried = {device.type: storage_capabilities(device) for device in devices}
    if json:
        found = {device: as_json(each) for device, each in tried.items()}
        print(json_format.dumps({"environment": facts, "storages": found, "readers": dict(readers())}))
    else:
        console = Console(highlight=False)
        for name, fact in facts.items():
            console.print(f"{name:24s} {fact}")
        for device, capabilities in tried.items():
            table = Table("storage", "train", "merge", "save", "bits", "error", "", title=f"storages on {device}")
            for each in capabilities:
                marks = ("yes" if ability else "no" for ability in (each.train, each.merge, each.save))
                table.add_row(
                    each.storage, *marks, f"{each.bits:.2f}", f"{each.relative_error:.2%}", each.trouble or ""
                )
            console.print(table)
        console.print("checkpoints that come quantised: " + ", ".join(readers()))
    if not all(each.train for capabilities in tried.values() for each in capabilities):
        raise typer.Exit(1)


def environment() -> dict[str, Any]:
    """Versions, devices, and which way the kernels go here."""
    import importlib.metadata
    import os
    import platform

    import psutil
    import torch

    from lowrank.kernels.cache_folder import cache_folder
    from lowrank.kernels.four_bit import dequantise_way, quantise_way

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    cpu = torch.device("cpu")
    facts = {
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        **{name: version(name) for name in ("lowrank", "torch", "transformers", "bitsandbytes", "triton", "peft")},
        "cores, threads": f"{os.cpu_count()}, {torch.get_num_threads()}",
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "bf16 in the processor": "yes" if torch.cpu._is_avx512_bf16_supported() else "no",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
        "quantises to 4 bits by": quantise_way(cpu),
        "dequantises 4 bits by": dequantise_way(cpu, torch.bfloat16),
        "cache folder": str(cache_folder()),
    }
    if torch.cuda.is_available():
        facts["dequantises on the GPU by"] = dequantise_way(torch.device("cuda"), torch.bfloat16)
    return facts

"""What each process reads and holds in host memory while it loads its part of a base.

python -m benchmarks.loading_of_ranks [--hidden 1024] [--layers 16] [--json FILE]

A Llama with random weights in bf16, and the copy of it that `lowrank quantize` writes (nf4). The base is loaded whole
by one process, and in parts by two and four (`base: sharded`), from either. Bytes read are the kernel's (`rchar`).
Memory is the resident size above that before loading, at most while it is read and after it; malloc is told to give
back what is free. All are of the process that has most.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

VOCABULARY = 259


def make(place: Path, options: argparse.Namespace) -> None:
    from lowrank.checkpoints.packed_model import quantize_model
    from lowrank.models.config import ModelConfig
    from tests.checkpoint_folder import save_checkpoint_folder

    sizes = {
        "hidden_size": options.hidden,
        "intermediate_size": 3 * options.hidden,
        "num_hidden_layers": options.layers,
    }
    save_checkpoint_folder(place / "small", dtype=torch.bfloat16)
    save_checkpoint_folder(place / "bf16", dtype=torch.bfloat16, **sizes)
    given: Any = {"path": str(place / "bf16"), "storage": "nf4", "dtype": "bfloat16", "device": "cpu"}
    quantize_model(ModelConfig(**given), place / "copy")


def status(name: str, file: str = "status") -> int:
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def child(options: argparse.Namespace) -> None:
    from lowrank.models.config import ModelConfig
    from lowrank.models.loading.pretrained import load
    from lowrank.models.sharded import Sharded

    counts: list[int] = []

    class Counting(Sharded):
        def finish(self, *given: Any) -> None:
            """All is read."""
            counts[:] = status("VmHWM"), status("VmRSS"), status("rchar", "io")
            super().finish(*given)

    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    cpu = torch.device("cpu")
    storage = "dense" if options.child.name == "copy" else "fp4"  # as large as nf4, and the copy is not taken
    given: Any = {"path": str(options.child), "storage": storage, "dtype": "bfloat16", "device": "cpu"}
    small: Any = {**given, "path": str(options.child.parent / "small"), "storage": "fp4"}
    load(ModelConfig(**small), placement=Sharded(cpu, world, world) if world > 1 else None)  # what is made once
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size begins anew
    resident, read = status("VmRSS"), status("rchar", "io")
    base = load(ModelConfig(**given), placement=Counting(cpu, world, world) if world > 1 else None)
    if world == 1:
        counts[:] = status("VmHWM"), status("VmRSS"), status("rchar", "io")
    own = [(counts[0] - resident) / 1e3, (counts[1] - resident) / 1e3, (counts[2] - read) / 1e6]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, own)
    if dist.get_rank() == 0:
        names = ("most_MB", "kept_MB", "read_MB")
        options.out.write_text(json.dumps({name: round(max(each)) for name, each in zip(names, zip(*found))}))
    dist.barrier()
    del base
    dist.destroy_process_group()


def run(source: Path, world: int, out: Path) -> dict[str, int]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.loading_of_ranks", "--child", str(source), "--out", str(out)]
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    own |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ranks = [subprocess.Popen(command, env={**os.environ, **own, "RANK": str(rank)}) for rank in range(world)]
    if sum(process.wait() for process in ranks):
        raise SystemExit(f"{source.name} in {world} failed")
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder, options)
        files = {name: sum(each.stat().st_size for each in (folder / name).glob("*.safetensors"))
                 for name in ("bf16", "copy")}  # fmt: skip
        found: dict[str, Any] = {"files_MB": {name: round(size / 1e6) for name, size in files.items()}}
        for name in files:
            found[name] = {str(world): run(folder / name, world, folder / "out.json") for world in (1, 2, 4)}
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

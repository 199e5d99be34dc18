"""Runs on a sharded base in processes that are started once for many of them.

python -m tests.pipelines.sharded_runs FILE     as one rank: trains each run of FILE, in one process group
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def align(file: Path) -> None:
    """Let the tensors of a safetensors file begin at multiples of 64 bytes, as those of torch's allocator do. A CPU's
    products have other last bits where a matrix does not, and a dense base lies in memory where it lies in its file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    spare = -(8 + length) % 64
    header = raw[8 : 8 + length] + b" " * spare
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def on_ranks(runs: list[dict[str, Any]], place: Path, world: int = 2, local: int | None = None) -> list[str]:
    """Train `runs`, one after the other, on `world` processes; what rank 0 prints of each: "done", or its error.
    `local`: ranks of a machine."""
    file = place / f"runs-{world}.json"
    file.write_text(json.dumps(runs))
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if local is not None:
        common["LOCAL_WORLD_SIZE"] = str(local)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.pipelines.sharded_runs", str(file)],
            env={**os.environ, **common, "RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        printed = ranks[0].communicate(timeout=1500)[0]
        assert [rank.wait(timeout=60) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
    return [line for line in printed.splitlines() if line.startswith(("done", "error"))]


def _rank(file: Path) -> None:
    import torch
    import torch.distributed as dist

    from lowrank.config import RunConfig
    from lowrank.errors import LowrankError
    from lowrank.pipelines.launch import train

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for given in json.loads(file.read_text()):
        try:
            train(RunConfig(**given), allow_code=True)
            outcome = "done"
        except LowrankError as error:
            outcome = f"error {' '.join(str(error).split())}"
        if dist.get_rank() == 0:
            print(outcome, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))

"""One and two processes on one run, beside TRL in accelerate's data parallel and FSDP2; and sums of gradients.

    python -m benchmarks.ranks [--steps 12] [--rounds 3] [--json FILE]

Each process has one thread. A Llama with random weights (`--hidden`, `--layers`), LoRA of rank 16 on all linears, and
rows of one length, so that nobody pads: each side takes the same rows in the same steps, in turns, and what is compared
are medians of steps, by the clock and by the processor time of all processes together, which other people's work hardly
stretches. `one_lane` is the engine as a run of one process has it; `two_lanes` computes the same step in two
parts. `sharded_2` and `trl_fsdp2` hold the base between two processes. Memory is of the first process at the peak of a
step, counted as torch makes and frees them, in a run of its own: what is resident says more of the allocator.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param

from benchmarks.machine import load

ROWS, LENGTH, VOCABULARY = 8, 128, 2048
CONTENDERS = {"one_lane": 1, "two_lanes": 1, "lowrank_2": 2, "sharded_2": 2, "streamed_1": 1,
              "accelerate_1": 1, "accelerate_2": 2, "trl_fsdp2": 2}  # fmt: skip
"""What is measured, and in how many processes."""
RATIOS = (("lowrank_2", "one_lane"), ("two_lanes", "one_lane"), ("sharded_2", "lowrank_2"), ("streamed_1", "one_lane"),
          ("accelerate_2", "accelerate_1"), ("one_lane", "accelerate_1"), ("lowrank_2", "accelerate_2"),
          ("sharded_2", "trl_fsdp2"))  # fmt: skip


def model(options: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": options.hidden,
        "intermediate_size": 3 * options.hidden,
        "num_hidden_layers": options.layers,
    }
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def rows(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, VOCABULARY, (ROWS, LENGTH))


class Counted:
    """Bytes of all tensors that are alive, in a process that is run for that alone; elsewhere nothing. FSDP2 resizes
    storages, which no operator tells: it is told of them, in both its users."""

    def __init__(self) -> None:
        from lowrank.planning.live_bytes import LiveBytes

        self.live = LiveBytes()
        for name in ("alloc_storage", "free_storage"):
            setattr(fsdp_param, name, partial(self._resized, getattr(fsdp_param, name)))

    def _resized(self, original: Callable[[torch.Tensor], None], tensor: torch.Tensor) -> None:
        original(tensor)
        self.live._see(tensor)


COUNTED: list[Counted] = []


def timed(steps: int, work: Callable[[int], None], kept: Iterable[torch.Tensor]) -> list[list[float]]:
    """Seconds of steps, by the clock and of the processor; or, where they are counted, the bytes at a step's peak, with
    what is `kept`."""
    work(0)  # takes memory, and imports
    for counted in COUNTED:
        gc.collect()
        for each in kept:
            counted.live._see(getattr(each, "_local_tensor", each))
        with counted.live, counted.live.phase() as phase:
            work(1)
        return [[phase.bytes]]
    seconds = []
    for step in range(1, steps + 1):
        began, processor = time.perf_counter(), time.process_time()
        work(step)
        seconds.append([time.perf_counter() - began, time.process_time() - processor])
    return seconds


def lowrank(options: argparse.Namespace) -> list[list[float]]:
    from lowrank.adapters.bank import Bank
    from lowrank.adapters.variants.lora import LoraConfig
    from lowrank.models.base import Base
    from lowrank.models.checks.isolation import choose_layout
    from lowrank.models.layers import decoder_layers
    from lowrank.models.sharded import Sharded
    from lowrank.models.streamed import Streamed
    from lowrank.objectives.sft import SFTConfig
    from lowrank.ranks import ALONE, Processes
    from lowrank.segments import Segment, number_the_step
    from lowrank.train.engine import Engine
    from lowrank.train.lanes import ManyLanes
    from lowrank.train.optimizers.adamw import AdamWConfig

    cpu, placement = torch.device("cpu"), None
    made = model(options)
    if options.contender == "sharded_2":
        placement = Sharded(cpu, 2, 2)
    elif options.contender == "streamed_1":
        placement = Streamed(cpu)
    for layer in decoder_layers(made) or ():
        if placement is not None:
            placement.keep(layer.requires_grad_(False))
    base = Base(made.requires_grad_(False), None, "benchmark", placement=placement)
    choose_layout(base, "auto")
    engine = Engine(base, Bank(base), 4096)
    ranks: Any = Processes() if dist.is_initialized() else ALONE
    if options.contender not in ("one_lane", "streamed_1"):
        engine.lanes = ManyLanes(ranks, 2, in_step=base.placement.in_step)
    slot = engine.bank.add(LoraConfig(rank=16), seed=0)
    engine.add(slot, SFTConfig().build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
    weight_L = np.ones(LENGTH, np.float32)

    def step(number: int) -> None:
        engine.forward_backward({slot: number_the_step([Segment(row_L, weight_L) for row_L in rows(number)])})
        engine.optim_step(slot, 1e-4)

    return timed(options.steps, step, [*made.parameters(), *made.buffers(), *engine.bank.parameters(slot).values()])


def accelerate(options: argparse.Namespace) -> list[list[float]]:
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model

    given = Accelerator(cpu=True)
    tuned = get_peft_model(model(options), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [each for each in tuned.parameters() if each.requires_grad]
    tuned, optimizer = given.prepare(tuned, torch.optim.AdamW(trained, lr=1e-4))
    own = ROWS // given.num_processes

    def step(number: int) -> None:
        token_SL = torch.from_numpy(rows(number)[given.process_index * own :][:own])
        given.backward(tuned(input_ids=token_SL, labels=token_SL).loss)
        given.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(options.steps, step, [*tuned.parameters(), *tuned.buffers()])


def trl_fsdp2(options: argparse.Namespace) -> list[list[float]]:
    """TRL's own training step over a model that accelerate's FSDP2 has cut. Its launcher leaves a CPU out of FSDP, so
    the plugin is handed to what prepares models; the trainer's loss and step are its own."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from peft import LoraConfig, get_peft_model
    from torch.distributed.device_mesh import init_device_mesh
    from trl.trainer.utils import selective_log_softmax

    given = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    prepares = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=init_device_mesh("cpu", (given.num_processes,), mesh_dim_names=("dp",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=["dp"]),
        mixed_precision="no",
        device=given.device,
        is_main_process=given.is_main_process,
    )
    tuned = get_peft_model(model(options), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    tuned = fsdp2_prepare_model(prepares, tuned)
    trained = [each for each in tuned.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    own = ROWS // given.num_processes

    def step(number: int) -> None:
        token_SL = torch.from_numpy(rows(number)[given.process_index * own :][:own])
        logits = tuned(input_ids=token_SL).logits
        (-selective_log_softmax(logits[:, :-1], token_SL[:, 1:]).mean()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(options.steps, step, [*tuned.parameters(), *tuned.buffers()])


def sums() -> list[dict[str, Any]]:
    """Our sum, by halves, beside the library's own."""
    from lowrank.ranks import Processes

    ranks, found = Processes(), []
    for numbers in (100_000, 2_000_000, 42_000_000):
        flat_N = torch.ones(numbers)
        ways = {"ours": lambda flat=flat_N: ranks.add(flat), "all_reduce": lambda flat=flat_N: dist.all_reduce(flat)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(5):
            for name, way in ways.items():
                dist.barrier()
                began = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - began)
        found.append({"bytes": 4 * numbers, **{name: statistics.median(each) for name, each in seconds.items()}})
    return found


def child(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    measured: Any
    if options.count:
        COUNTED.append(Counted())
    if options.contender == "sums":
        measured = sums()
    elif options.contender == "trl_fsdp2":
        measured = trl_fsdp2(options)
    else:
        measured = accelerate(options) if options.contender.startswith("accelerate") else lowrank(options)
    if dist.is_initialized() and options.contender != "sums" and not options.count:
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, measured)
        measured = [[max(each[0] for each in step), sum(each[1] for each in step)] for step in zip(*of_ranks)]
    if os.environ.get("RANK", "0") == "0":
        options.out.write_text(json.dumps(measured))
    if dist.is_initialized():
        dist.destroy_process_group()


def run(contender: str, world: int, options: argparse.Namespace, folder: Path, count: bool = False) -> Any:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    out = folder / f"{contender}.json"
    command = [sys.executable, "-m", "benchmarks.ranks", "--contender", contender, "--out", str(out)]
    command += [f"--{name}={getattr(options, name)}" for name in ("steps", "hidden", "layers")]
    command += ["--count"] if count else []
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    launched = {"LOCAL_WORLD_SIZE": str(world)} if world > 1 else {}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **own, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    for process in ranks:
        if process.wait():
            raise SystemExit(f"{contender} failed")
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        child(options)
        return
    seconds: dict[str, list[list[float]]] = {name: [] for name in CONTENDERS}
    loads = [load()]
    with tempfile.TemporaryDirectory() as place:
        for _ in range(options.rounds):
            for name, world in CONTENDERS.items():
                seconds[name] += run(name, world, options, Path(place))
                loads.append(load())
        tensors = {
            name: round(run(name, world, options, Path(place), count=True)[0][0] / 1e6)
            for name, world in CONTENDERS.items()
        }
        of_sums = run("sums", 2, options, Path(place))
    found: dict[str, Any] = {"load": [min(loads), statistics.median(loads), max(loads)]}
    for number, kind in enumerate(("second", "processor_second")):
        rate = {
            name: ROWS * LENGTH / statistics.median(step[number] for step in each) for name, each in seconds.items()
        }
        found[f"tokens_per_{kind}"] = {name: round(each, 1) for name, each in rate.items()}
        found[f"ratios_by_{kind}"] = {f"{one} / {other}": round(rate[one] / rate[other], 3) for one, other in RATIOS}
    found |= {
        "tensors_MB_at_the_peak_of_a_step": tensors,
        "sums": of_sums,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps({**found, "seconds": seconds, "torch": torch.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main()

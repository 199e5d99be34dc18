"""Many clients of one server: their requests spread over many adapters, against all of them to one adapter.

    python -m benchmarks.serve_load --clients 64 --adapters 16
    python -m benchmarks.serve_load --registered 1000 --minutes 10      # memory; adapters come from disk and leave

A real server (HTTP on loopback, in a process of its own) with random LoRA adapters on `lowrank/tiny`, any other base,
or with `--layers N` that many random layers of the shape of Qwen2.5-0.5B and its vocabulary.
Each client sends its requests one after another, streamed. Both loads have the same prompts, lengths and order, and
take turns; the ratio is of answered tokens per second of the server's processor time, which other work on the machine
disturbs less than wall time. Throughput in wall time and the memory of the server are reported beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import transformers

from benchmarks.machine import describe
from benchmarks.workload import QWEN_05B
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.checkpoints.atomic import current
from lowrank.checkpoints.peft_config import BaseDescription
from lowrank.checkpoints.peft_layout import AdapterOnDisk, save_adapter
from lowrank.generate.generator import GeneratorConfig
from lowrank.pipelines.inference import InferenceModel, open_inference_model
from lowrank.serve.engines.torch import BankEngine
from lowrank.serve.limits import RequestLimits
from lowrank.serve.server import run

TOKEN = "benchmark"
VOCABULARY = ["sea", "house", "green", "river", "stone", "bird", "light", "winter", "bread", "song"]


def prompt_of(client: int, number: int) -> str:
    """Of a client's n-th request: 10 to 29 words."""
    return " ".join(
        VOCABULARY[(client * 7 + number * 3 + place) % len(VOCABULARY)] for place in range(10 + client % 20)
    )


def serve(options: argparse.Namespace, port: Any) -> None:
    """The server's process."""
    torch.set_num_threads(options.threads)
    trained = open_inference_model(options.model, notify=lambda text: None)
    generator = torch.Generator().manual_seed(0)
    for index in range(options.adapters):
        slot = trained.bank.add(LoraConfig(rank=options.rank, alpha=2 * options.rank), seed=index)
        with torch.no_grad():
            for name, parameter in trained.bank.parameters(slot).items():
                if "lora_B" in name:
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        trained.bank.refresh(slot)
        trained.slots[f"a{index}"] = slot
    config = GeneratorConfig(max_num_seqs=options.clients, enable_prefix_caching=False)
    engine = BankEngine(
        trained.base,
        trained.bank,
        trained.renderer,
        trained.slots,
        roots=[options.shelf] if options.registered else [],
        config=config,
        max_loras=options.max_loras,
    )
    if options.registered:
        fill_shelf(options, trained)
        engine.cache.register_all(options.shelf)
    limits = RequestLimits(max_num_seqs=options.clients)
    run(engine, host="127.0.0.1", port=0, token=TOKEN, limits=limits, on_listening=lambda number: port.put(number))


def fill_shelf(options: argparse.Namespace, trained: InferenceModel) -> None:
    """Adapter folders b0, b1, ...: each of the adapters in memory again and again (links to the same files)."""
    options.shelf.mkdir()
    described = BaseDescription(options.model)
    for index in range(options.registered):
        folder, source = options.shelf / f"b{index}", options.shelf / f"b{index % options.adapters}"
        if index < options.adapters:
            saved = trained.bank.saved(trained.slots[f"a{index}"])
            save_adapter(folder, AdapterOnDisk(saved.config, saved.tensors, saved.ranks), described)
        else:
            folder.mkdir()
            for file in current(source).iterdir():
                os.link(file, folder / file.name)


async def one_client(http: httpx.AsyncClient, requests: list[dict[str, Any]], first: list[float]) -> int:
    """Its requests one after another; answered tokens."""
    tokens = 0
    for body in requests:
        started = time.perf_counter()
        async with http.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.status_code == 200, await reply.aread()
            until_first = None
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    if until_first is None:
                        until_first = time.perf_counter() - started
                        first.append(until_first)
                    content = json.loads(line.removeprefix("data: "))
                    assert "error" not in content, content
                    tokens += (content.get("usage") or {}).get("completion_tokens", 0)
    return tokens


async def load(url: str, options: argparse.Namespace, names: Sequence[str]) -> tuple[int, list[float]]:
    """All clients at once, their requests spread over `names`; answered tokens, seconds to each first chunk."""
    first: list[float] = []
    headers = {"Authorization": f"Bearer {TOKEN}"}
    connections = httpx.Limits(max_connections=options.clients)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=connections) as http:
        clients = []
        for client in range(options.clients):
            requests = []
            for number in range(options.requests):
                which = names[(client + number * options.clients) % len(names)]
                requests.append(
                    {
                        "model": which,
                        "prompt": prompt_of(client, number),
                        "max_tokens": options.new_tokens,
                        "temperature": 1.0,
                        "seed": client,
                        "logit_bias": options.never_stop,
                        "stream": True,
                        "stream_options": {"include_usage": True},
                    }
                )
            clients.append(one_client(http, requests, first))
        return sum(await asyncio.gather(*clients)), first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lowrank/tiny")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, help="a random base of this many layers instead of --model")
    parser.add_argument("--registered", type=int, default=0, help="also a load on that many adapter folders")
    parser.add_argument("--max-loras", type=int, default=32, help="of those, in memory at once")
    parser.add_argument("--minutes", type=float, help="go on with both loads in turns this long, and watch the memory")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.layers:
            options.model = random_base(Path(folder), options.layers)
        options.shelf = Path(folder) / "shelf"
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """The loads in turns."""
    options.never_stop = never_stop(options.model)
    context = multiprocessing.get_context("spawn")
    port: Any = context.Queue()
    server = context.Process(target=serve, args=(options, port), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{port.get(timeout=300)}"
    process = psutil.Process(server.pid)
    loads = {"one_adapter": ["a0"], "many_adapters": [f"a{index}" for index in range(options.adapters)]}
    if options.registered:
        loads["registered_adapters"] = [f"b{index}" for index in range(options.registered)]
        random.Random(0).shuffle(loads["registered_adapters"])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in loads}
    started_all = time.monotonic()
    memory: list[tuple[float, int]] = []
    round_ = -1
    while (round_ := round_ + 1) <= options.rounds or _minutes(started_all) < (options.minutes or 0):
        for name in found:
            if round_ > options.rounds and _minutes(started_all) > options.minutes:
                break
            busy, started = sum(process.cpu_times()[:2]), time.perf_counter()
            names = loads[name][round_ % len(loads[name]) :] + loads[name][: round_ % len(loads[name])]
            tokens, first = asyncio.run(load(url, options, names))
            wall, processor = time.perf_counter() - started, sum(process.cpu_times()[:2]) - busy
            memory.append((round(_minutes(started_all), 2), process.memory_info().rss))
            if round_:  # the first warms up
                figures = {"tokens": tokens, "processor_seconds": processor, "wall_seconds": wall}
                figures |= {"first_chunk_median": statistics.median(first), "first_chunk_most": max(first)}
                found[name].append({**figures, "server_bytes": process.memory_info().rss})
    speed = {
        name: statistics.median(r["tokens"] / r["processor_seconds"] for r in runs) for name, runs in found.items()
    }
    result = {
        "settings": {
            **{key: value for key, value in vars(options).items() if key not in ("output", "shelf")},
            "model": "random" if options.layers else options.model,
        },
        "machine": {**describe("cpu"), "load": os.getloadavg()},
        "runs": found,
        "tokens_per_processor_second": speed,
        "many_adapters_against_one": speed["many_adapters"] / speed["one_adapter"],
        "server_bytes_by_minute": memory,
    }
    server.terminate()
    server.join(60)
    reported = ("tokens_per_processor_second", "many_adapters_against_one", "server_bytes_by_minute")
    print(json.dumps({key: result[key] for key in reported}))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def _minutes(since: float) -> float:
    return (time.monotonic() - since) / 60


def random_base(folder: Path, layers: int) -> str:
    """With the tokenizer of `lowrank/tiny`, which knows fewer tokens than the head has rows."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**{**QWEN_05B, "num_hidden_layers": layers})
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    open_inference_model("lowrank/tiny", notify=lambda text: None).base.tokenizer.save_pretrained(folder)
    return str(folder)


def never_stop(model: str) -> dict[str, float]:
    """A bias that keeps every answer at the same length."""
    trained = open_inference_model(model, notify=lambda text: None)
    return {str(token): -100.0 for token in trained.renderer.stop_tokens}


if __name__ == "__main__":
    main()

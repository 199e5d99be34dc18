"""One server for many adapters, against PEFT's mixed batches and transformers' own server.

    python -m benchmarks.serve_peers --clients 64 --adapters 16

Contenders with one thread each take turns on the same prompts (serve_load.py) and as many new tokens, greedy:

    lowrank_many    our server over HTTP, requests spread over all adapters
    lowrank_one     the same, all requests to one adapter
    peft_many       PEFT's `generate(adapter_names=...)`: one padded batch of all clients after another, no server
    peft_one        the same with one adapter
    transformers    `transformers serve --continuous-batching` over HTTP, one adapter merged: it serves no adapters

The figures are answered tokens per second of the contender's processor time, and of wall time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import peft
import psutil
import torch
import transformers

from benchmarks.machine import describe
from benchmarks.serve_load import TOKEN, never_stop, prompt_of, random_base, serve
from lowrank.models.loading.pretrained import locate

_NEVER = 7
"""A token that stands for the end in the copy for transformers' server, so that it stops by length alone."""


def with_adapters(options: argparse.Namespace) -> Any:
    """PEFT's model with random adapters a0, a1, ..."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16)
    settings = peft.LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", init_lora_weights=False
    )
    model = peft.get_peft_model(model, settings, adapter_name="a0")
    for index in range(1, options.adapters):
        model.add_adapter(f"a{index}", settings)
    return model.to(torch.bfloat16).eval()


def run_peft(options: argparse.Namespace, line: Any) -> None:
    """Answers every `spread` that comes through `line` with the number of new tokens."""
    torch.set_num_threads(1)
    model = with_adapters(options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.folder, padding_side="left")
    tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    line.send("ready")
    while (spread := line.recv()) is not None:
        tokens = 0
        for number in range(options.requests):
            prompts = [prompt_of(client, number) for client in range(options.clients)]
            names = [f"a{(client + number) % options.adapters if spread else 0}" for client in range(options.clients)]
            batch = tokenizer(prompts, return_tensors="pt", padding=True)
            batch.pop("token_type_ids", None)
            length = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}
            with torch.no_grad():
                generated = model.generate(**batch, **length, do_sample=False, adapter_names=names)
            tokens += generated.shape[0] * (generated.shape[1] - batch["input_ids"].shape[1])
        line.send(tokens)


async def run_all(url: str, options: argparse.Namespace, body: Callable[[int, int], dict[str, Any]]) -> int:
    """All clients at once, each with its requests one after another; answered tokens."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    connections = httpx.Limits(max_connections=options.clients)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=900, limits=connections) as http:

        async def one(client: int) -> int:
            tokens = 0
            for number in range(options.requests):
                content = {"prompt": prompt_of(client, number), "max_tokens": options.new_tokens, "temperature": 0.0}
                reply = await http.post("/v1/completions", json={**content, **body(client, number)})
                assert reply.status_code == 200, reply.text
                tokens += reply.json()["usage"]["completion_tokens"]
            return tokens

        return sum(await asyncio.gather(*(one(client) for client in range(options.clients))))


def start_transformers(options: argparse.Namespace, folder: Path) -> tuple[psutil.Popen, str]:
    """`transformers serve` on a merged adapter; its process and address."""
    merged = with_adapters(options)
    merged.set_adapter("a0")
    merged = merged.merge_and_unload()
    merged.generation_config = transformers.GenerationConfig(eos_token_id=_NEVER, pad_token_id=0)
    merged.config.eos_token_id = _NEVER
    merged.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(options.folder).save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    room = options.clients * (80 + options.new_tokens)
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    command += ["--dtype", "bfloat16", "--continuous-batching", "--port", str(port), "--cb-max-batch-tokens", "512"]
    command += ["--cb-num-blocks", str(-(-room // 32) + 8), "--cb-block-size", "32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://localhost:{port}"
    for _ in range(600):
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return process, url
        except httpx.HTTPError:
            assert process.poll() is None, "transformers serve ended; run the same words by hand"
        time.sleep(0.5)
    raise TimeoutError("transformers serve did not come up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lowrank/tiny")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="a random base of this many layers instead of --model")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.registered, options.max_loras = 0, 32
    options.threads, options.shown = 1, "random" if options.layers else options.model
    with tempfile.TemporaryDirectory() as folder:
        if options.layers:
            options.model = random_base(Path(folder) / "base", options.layers)
        options.folder = locate(options.model)
        measure(options, Path(folder) / "merged")


def measure(options: argparse.Namespace, merged: Path) -> None:
    """All contenders in turns; the first round warms up."""
    context = multiprocessing.get_context("spawn")
    port: Any = context.Queue()
    ours = context.Process(target=serve, args=(options, port), daemon=True)
    ours.start()
    here, there = context.Pipe()
    theirs = context.Process(target=run_peft, args=(options, there), daemon=True)
    theirs.start()
    assert here.recv() == "ready"
    server, url_of_transformers = start_transformers(options, merged)
    url = f"http://127.0.0.1:{port.get(timeout=300)}"
    bias = {"logit_bias": never_stop(options.model)}

    def generate_here(spread: bool) -> int:
        def body(client: int, number: int) -> dict[str, Any]:
            return {"model": f"a{(client + number) % options.adapters if spread else 0}", **bias}

        return asyncio.run(run_all(url, options, body))

    def generate_with_peft(spread: bool) -> int:
        here.send(spread)
        return here.recv()

    contenders: dict[str, tuple[psutil.Process, Callable[[], int]]] = {
        "lowrank_many": (psutil.Process(ours.pid), lambda: generate_here(True)),
        "lowrank_one": (psutil.Process(ours.pid), lambda: generate_here(False)),
        "peft_many": (psutil.Process(theirs.pid), lambda: generate_with_peft(True)),
        "peft_one": (psutil.Process(theirs.pid), lambda: generate_with_peft(False)),
        "transformers": (
            psutil.Process(server.pid),
            lambda: asyncio.run(run_all(url_of_transformers, options, lambda client, number: {"model": str(merged)})),
        ),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    try:
        for round_ in range(options.rounds + 1):
            for name, (process, run) in contenders.items():
                busy, started = sum(process.cpu_times()[:2]), time.perf_counter()
                tokens = run()
                wall, processor = time.perf_counter() - started, sum(process.cpu_times()[:2]) - busy
                if round_:
                    runs[name].append({"tokens": tokens, "processor_seconds": processor, "wall_seconds": wall})
    finally:
        server.terminate()
        ours.terminate()
        theirs.terminate()

    def median(name: str, seconds: str) -> float:
        return statistics.median(each["tokens"] / each[seconds] for each in runs[name])

    speed = {name: median(name, "processor_seconds") for name in runs}
    result = {
        "settings": {
            **vars(options),
            "output": None,
            "folder": None,
            "model": options.shown,
        },
        "machine": {**describe("cpu"), "load": os.getloadavg()},
        "runs": runs,
        "tokens_per_processor_second": speed,
        "tokens_per_second": {name: median(name, "wall_seconds") for name in runs},
        "lowrank_many_against": {name: speed["lowrank_many"] / speed[name] for name in runs},
    }
    reported = ("tokens_per_processor_second", "tokens_per_second", "lowrank_many_against")
    print(json.dumps({key: result[key] for key in reported}, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""A real server on a free loopback port, on the base that ships with lowrank, with adapters that say other things."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.checkpoints.peft_config import BaseDescription
from lowrank.checkpoints.peft_layout import AdapterOnDisk, save_adapter
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.generate.generator import GeneratorConfig
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load, load_tokenizer
from lowrank.pipelines.inference import InferenceModel
from lowrank.serve.engine import ServeEngine
from lowrank.serve.engines.torch import BankEngine
from lowrank.serve.limits import RequestLimits
from lowrank.serve.server import make_server

TOKEN = "a-token-of-the-tests"


def random_adapter(trained: InferenceModel, name: str, seed: int, scale: float = 0.3) -> int:
    """A LoRA that changes what the base says, under `name`."""
    slot = trained.bank.add(LoraConfig(rank=4, alpha=8), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in trained.bank.parameters(slot).items():
            if "lora_B" in key:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    trained.bank.refresh(slot)
    trained.slots[name] = slot
    return slot


def save(trained: InferenceModel, slot: int, folder: Path) -> None:
    """As a run writes it."""
    saved = trained.bank.saved(slot)
    save_adapter(folder, AdapterOnDisk(saved.config, saved.tensors, saved.ranks), BaseDescription("lowrank/tiny"))


def open_world() -> InferenceModel:
    """`lowrank/tiny` and the adapters one and two, in float32: in bfloat16 the likeliest token may hang on company."""
    model = ModelConfig(path="lowrank/tiny", dtype="float32", device="cpu")
    tokenizer = load_tokenizer(model)
    base = load(model, tokenizer=tokenizer, notify=lambda text: None)
    trained = InferenceModel(base, Bank(base), Renderer(tokenizer, DataConfig()))
    random_adapter(trained, "one", 1)
    random_adapter(trained, "two", 2)
    return trained


@dataclass
class Running:
    """A server that answers."""

    trained: InferenceModel
    engine: BankEngine
    url: str
    service: Any
    clients: list[Any]
    """To be closed."""

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0, **options)
        self.clients.append(client)
        return client

    def http(self, **headers: str) -> httpx.Client:
        """One that knows the token."""
        client = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}", **headers}, timeout=60)
        self.clients.append(client)
        return client

    def settles(self) -> bool:
        """Nobody holds anything any more."""
        generator = self.engine.generator
        for _ in range(200):
            free = (
                generator.free_tokens
                == generator.schedule.block_manager.capacity * generator.schedule.block_manager.page_size
            )
            if not generator.busy and free and self.service.limiter.taken == 0:
                return True
            time.sleep(0.02)
        return False


@contextmanager
def http_serving(
    engine: ServeEngine,
    limits: RequestLimits | None = None,
    services: list[Any] | None = None,
    origins: Sequence[str] = (),
) -> Iterator[str]:
    """The address of a server around any engine; its `Service` is put into `services`."""
    server = make_server(engine, token=TOKEN, hosts=(), limits=limits or RequestLimits(), origins=origins)
    server.config.port = 0
    app: Any = server.config.app
    if services is not None:
        services.append(app.state.service)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def serving(
    trained: InferenceModel, *, limits: RequestLimits | None = None, max_rows: int = 64, **options: Any
) -> Iterator[Running]:
    """A server on our own engine; clients it handed out are closed after it."""
    config = GeneratorConfig(max_num_seqs=max_rows, kv_cache_tokens=8192)
    engine = BankEngine(trained.base, trained.bank, trained.renderer, trained.slots, config=config, **options)
    services: list[Any] = []
    clients: list[Any] = []
    try:
        with http_serving(engine, limits, services) as url:
            yield Running(trained, engine, url, services[0], clients)
    finally:
        for client in clients:
            client.close()

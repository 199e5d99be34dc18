"""What a device is said to hold of a base that is moved about, beside what FSDP2 and the stream from the host hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
import transformers

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.models.base import Base
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.config import ModelConfig
from lowrank.models.layers import decoder_layers
from lowrank.models.sharded import Sharded
from lowrank.objectives.sft import SFTConfig
from lowrank.planning.base_bytes import base_bytes
from lowrank.planning.live_bytes import LiveBytes
from lowrank.planning.memory import StepMemory
from lowrank.planning.peaks import Peaks
from lowrank.planning.placed import Placed
from lowrank.planning.simulation import PlannedJob, read_config
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.command_line import lowrank
from tests.tiny_models import make_engine, random_step

WORLD = 8
ADAPTER = LoraConfig(rank=8)
JOB = PlannedJob(ADAPTER, SFTConfig().build(), AdamWConfig(), random_step(0, (200, 100), 4000))


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveBytes]:
    """Counts, on one rank of eight; the others are nowhere, so what is gathered has any values."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    live = LiveBytes()
    for name in ("alloc_storage", "free_storage"):
        original = getattr(fsdp_param, name)

        def seen(tensor: torch.Tensor, original: Any = original) -> None:
            original(tensor)
            live._see(tensor)  # FSDP resizes storages, which no operator tells

        monkeypatch.setattr(fsdp_param, name, seen)
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    yield live
    dist.destroy_process_group()


def model_of(folder: Path, **changes: Any) -> ModelConfig:
    """Matrices that are large beside everything else."""
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 3, "vocab_size": 4096}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False}
    transformers.LlamaConfig(**{**shape, **heads, **changes}).save_pretrained(folder)
    return ModelConfig(path=str(folder), device="cpu", dtype="float32", memory_efficient_modules=False)


def test_a_rank_of_eight(tmp_path: Path, live: LiveBytes) -> None:
    """The bytes it keeps to 1 %, and the peak of each phase of a pass within 10 %."""
    config = model_of(tmp_path)
    shape = read_config(config)
    memory = StepMemory(config, [JOB], placed=Placed("sharded", WORLD, WORLD))
    trace = memory._policy(memory.heaviest_batch(4096), "full")
    planned = memory.placed.moved(trace, base_bytes(config, shape))
    with live:
        model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval().requires_grad_(False)
        placement = Sharded(torch.device("cpu"), WORLD, WORLD)
        for layer in decoder_layers(model) or ():
            placement.keep(layer)
        base = Base(model, None, "x", placement=placement)
        base.set_layout("packed")
        set_activation_checkpointing(model, "full")
        engine, (slot,) = make_engine(base, ADAPTER)
        before, peaks = live.now, Peaks(live)
        (batch,) = engine.micro_batches({slot: JOB.step})
        engine.passes.trace(engine.passes.prepare(batch), peaks)
    held = sum(getattr(each, "_local_tensor", each).nbytes for each in (*model.parameters(), *model.buffers()))
    assert planned.base == pytest.approx(held, rel=0.01)
    for name, peak in zip(("forward", "loss", "backward"), peaks.bytes):
        assert getattr(planned, name) == pytest.approx(peak - before, rel=0.1), name


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_the_parts_of_a_base(storage: str, tmp_path: Path) -> None:
    """They are the base that is simulated, tied or not; and each way to keep it."""
    for tied in (False, True):
        config = model_of(tmp_path / str(tied), tie_word_embeddings=tied).model_copy(
            update={"storage": ModelConfig(path="x", storage=storage).storage}  # type: ignore[arg-type]
        )
        memory = StepMemory(config, [JOB])
        parts, whole = memory.parts, memory.step(4096, "full")
        assert len(parts.layers) == 3
        assert parts.total == pytest.approx(whole.base, rel=0.001)
        assert (parts.head == 0) == tied
        quarter = memory.placed_as(Placed("sharded", 4, 4))
        assert quarter.step(4096, "full").base == pytest.approx(parts.total / 4, rel=0.01)
        assert quarter.placed.sent_for_base(parts, 3) == pytest.approx(
            3 * 0.75 * (2 * sum(parts.layers) + parts.embedding + (parts.head or parts.embedding)), rel=0.001
        )
        host = memory.placed_as(Placed("streamed"))
        assert host.step(4096, "full").base == parts.total - sum(parts.layers)
        assert host.placed.on_host(parts) == sum(parts.layers)
        assert memory.placed_as(Placed("sharded", 1, 1)).step(4096, "full") == whole


def test_a_plan_for_devices_that_are_elsewhere(tmp_path: Path) -> None:
    """`lowrank plan` says which way of keeping the base fits on eight GPUs of a memory that nobody has here."""
    model_of(tmp_path / "model", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
    from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca

    tokenizer = save_checkpoint_folder(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "model" / name).write_bytes((tokenizer / name).read_bytes())
    write_alpaca(tmp_path / "train.json", 24)
    settings = {"model": str(tmp_path / "model"), "data": {"train": [str(tmp_path / "train.json")], "batch_size": 8}}
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**settings, "output_dir": str(tmp_path / "run"), "max_steps": 3}))

    def planned(*arguments: str) -> dict[str, Any]:
        done = lowrank("plan", str(file), "--json", "--brief", "--device-memory", "1.5", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    found = planned("devices=8")
    ways = {way["base"]: way for way in found["devices"]["ways"]}
    assert {name: way["fits"] for name, way in ways.items()} == {"replicated": False, "sharded": True, "streamed": True}
    assert not found["plan"]["fits"]
    assert planned("devices=8", "base=sharded")["plan"]["fits"]
    assert ways["replicated"]["bytes_of_base_per_step"] == 0 < ways["sharded"]["bytes_of_base_per_step"]
    assert ways["streamed"]["bytes_on_host"] > 1.5e9

"""A base in parts: what each rank keeps while the base is read, and every storage and family beside itself whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.errors import ModelError
from lowrank.models.config import ModelConfig
from lowrank.models.layers import decoder_layers
from lowrank.models.loading import pretrained
from lowrank.models.loading.layers_arriving import LayersArriving
from lowrank.models.placement import Whole
from lowrank.models.sharded import Sharded, packs_integers
from tests.checkpoint_folder import save_checkpoint_folder
from tests.models.sharded_ranks import held
from tests.tiny_models import make_base, make_engine, random_step

packed_in_parts = pytest.mark.skipif(not packs_integers(), reason="torch 2.12")


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    """This process is one of eight, the others are nowhere: what is gathered has no values."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("storage", ["dense", pytest.param("nf4", marks=packed_in_parts)])
def test_never_more_than_one_layer_is_whole(storage: str, tmp_path: Path, eight_ranks: None) -> None:
    """While the checkpoint is read: a layer is cut when its last tensor has come, before the next one's first."""
    save_checkpoint_folder(tmp_path, num_hidden_layers=4)
    config = ModelConfig(path=str(tmp_path), dtype="float32", device="cpu", storage=storage)  # type: ignore[arg-type]
    cpu, kept = torch.device("cpu"), []
    placement = Sharded(cpu, 8, 8)
    arriving: Any = None

    def arrived(layer: nn.Module) -> None:
        others = [each for each in decoder_layers(arriving._model) or () if each is not layer]
        read = [each for each in others if not any(part.is_meta for part in each.parameters())]
        size = held(layer)
        pretrained._keep_layer(config, cpu, placement, layer)
        assert read == kept, "the next is not begun"
        assert held(layer) < 0.2 * size
        kept.append(layer)

    arriving = LayersArriving(arrived)
    model, _ = pretrained._load_model(config, torch.float32, cpu, False, arriving)
    assert list(decoder_layers(model) or ()) == kept


def test_a_model_without_layers_is_refused(tmp_path: Path) -> None:
    arriving = LayersArriving(partial(pytest.fail, "nothing arrives"))
    with pytest.raises(ModelError, match=r"no stack of decoder layers.*base: replicated"):
        arriving.begin(nn.Linear(2, 2))


class InStep(Whole):
    in_step = True


def test_out_of_memory_stops_everybody_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody does a part of the step again alone, since the others wait in a gather."""
    base = make_base()
    engine, (slot,) = make_engine(base, LoraConfig(rank=2), micro_batch_tokens=64)
    base.placement = InStep(torch.device("cpu"))
    passes = []

    def hidden(*args: Any, **options: Any) -> Any:
        passes.append(args)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(base, "hidden", hidden)
    with pytest.raises(ModelError, match=r"up to 64 tokens.*all stop.*resume: true.*smaller micro_batch_tokens"):
        engine.forward_backward({slot: random_step(0, (9, 12, 30, 40))})
    assert len(passes) == 1, "it is not tried again"


@pytest.mark.slow
@pytest.mark.parametrize(("world", "what", "number", "share"), [(2, (), 90, 0.65), (4, ("storages",), 40, 0.4)])
def test_storages_and_families_on_ranks(world: int, what: tuple[str, ...], number: int, share: float) -> None:
    """Two jobs, steps in passes of different number, an evaluation, log-probabilities: the same bits as on the whole
    base, for a half or a quarter of its bytes on each (tables of positions stay whole). About 3 minutes, and 1."""
    common = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"2987{world}"}
    arguments = [sys.executable, "-m", "tests.models.sharded_ranks", *what]
    ranks = [
        subprocess.Popen(
            arguments,
            env={**common, "RANK": str(rank)},
            stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    output = ranks[0].communicate(timeout=1200)[0].splitlines()
    assert [rank.wait(timeout=60) for rank in ranks] == [0] * world
    assert [line for line in output if ": 0 " not in line and ": refused" not in line] == []
    assert len(output) > number
    shares = [float(line.rpartition(", ")[2].split()[0]) for line in output if "of the bytes" in line]
    assert max(shares) < share

"""From a checkpoint that is packed already, as `lowrank quantize` writes it, a device reads no more than it keeps."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lowrank.adapters.variants.dora import DoraConfig
from lowrank.checkpoints.packed_model import quantize_model
from lowrank.models.config import ModelConfig
from lowrank.models.host_blocks import MachineBlocks
from lowrank.models.layers import decoder_layers
from lowrank.models.loading import pretrained
from lowrank.models.loading.checkpoint_files import StoredTensor
from lowrank.models.loading.layers_arriving import LayersArriving
from lowrank.models.placement import Placement
from lowrank.models.prequantized import KeepsBytes, reader_for
from lowrank.models.prequantized.bnb import as_config, as_tensors
from lowrank.models.sharded import Sharded, packs_integers
from lowrank.models.storages.fp4 import FP4Config
from lowrank.models.storages.int8 import Int8Config
from lowrank.models.storages.nf4 import NF4Config
from lowrank.models.streamed import Streamed
from tests.checkpoint_folder import save_checkpoint_folder
from tests.models.prequantized.test_readers import LAYER, NAMES, read
from tests.models.sharded_ranks import differing
from tests.tiny_models import make_engine, random_step
from tests.train.rank_threads import ThreadRank, on_ranks

CPU = torch.device("cpu")
STORAGES: dict[str, Any] = {
    "nf4": NF4Config(), "nf4 double": NF4Config(double_quant=True), "fp4": FP4Config(), "int8": Int8Config()
}  # fmt: skip


def copy_of(place: Path, storage: str = "nf4") -> ModelConfig:
    """A quantized copy of a model of three layers, whose sizes do not divide by eight."""
    save_checkpoint_folder(place / "model", num_hidden_layers=3, hidden_size=40, intermediate_size=52)
    common: Any = {"dtype": "float32", "device": "cpu"}
    quantize_model(ModelConfig(path=str(place / "model"), storage=STORAGES[storage], **common), place / "copy")
    return ModelConfig(path=str(place / "copy"), **common)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of each tensor of the checkpoint."""
    found: Counter[str] = Counter()
    original = StoredTensor._read

    def counted(self: StoredTensor, offset: int, size: int) -> torch.Tensor:
        found[self.name] += size
        return original(self, offset, size)

    monkeypatch.setattr(StoredTensor, "_read", counted)
    return found


def loaded(config: ModelConfig, placement: Placement | None = None) -> Any:
    """The model, without the tests of a base, which would gather."""
    arriving = placement and LayersArriving(partial(pretrained._keep_layer, config, CPU, placement))
    return pretrained._load_model(config, torch.float32, CPU, False, arriving)[0]


def tensors_of_layers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{number} {name}": tensor
        for number, layer in enumerate(decoder_layers(model) or ())
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
    }


@pytest.mark.skipif(not packs_integers(), reason="torch 2.12")
@pytest.mark.parametrize("storage", STORAGES)
def test_each_of_eight_ranks_reads_its_slice(storage: str, tmp_path: Path, bytes_read: Counter[str]) -> None:
    """The slices are those of a base that was read whole, and all ranks together read every byte once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = copy_of(tmp_path, storage)
    bytes_read.clear()
    whole = tensors_of_layers(loaded(config))
    in_full, by_rank = dict(bytes_read), []
    for rank in range(8):
        bytes_read.clear()
        dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
        try:
            parts: dict[str, Any] = tensors_of_layers(loaded(config, Sharded(CPU, 8, 8)))
            for name, tensor in whole.items():
                cut = parts[name]
                expected = tensor if tensor.numel() == 1 else (*tensor.chunk(8), *[tensor[:0]] * 8)[rank]
                local = cut.to_local() if tensor.numel() > 1 else cut
                assert cut.shape == tensor.shape
                assert torch.equal(local, expected), name
        finally:
            dist.destroy_process_group()
        by_rank.append(dict(bytes_read))
    codes = [name for name in in_full if ".layers." in name and name.endswith(("_proj.weight", ".absmax", ".SCB"))]
    assert len(codes) == 3 * 7 * 2
    for name in codes:
        assert sum(each[name] for each in by_rank) == in_full[name]
        assert max(each[name] for each in by_rank) <= in_full[name] / 8 + 64, "a row more than others"


def test_a_streamed_base_is_read_into_host_memory_and_trains_the_same(tmp_path: Path, bytes_read: Counter[str]) -> None:
    config = copy_of(tmp_path)
    found = []
    for placement in (None, Streamed(CPU)):
        bytes_read.clear()
        base = pretrained.load(config, placement=placement)
        engine, (slot,) = make_engine(base, DoraConfig(rank=4))
        engine.forward_backward({slot: random_step(0, (9, 12))})
        engine.optim_step(slot, 0.01)
        found.append({name: each.detach() for name, each in engine.bank.parameters(slot).items()})
        found[-1] |= dict(bytes_read.items())  # type: ignore[arg-type]
    assert differing(*found) == [], "each tensor is read once, too"


def test_only_the_first_rank_of_a_machine_reads_what_is_in_a_file() -> None:
    def work(ranks: ThreadRank) -> int:
        filled = []

        def fill(block: torch.Tensor) -> None:
            filled.append(block.fill_(7))

        block = MachineBlocks(ranks, pin=False, warn=pytest.fail, machine="a").block(500, fill, compare=False)
        assert block.eq(7).all()
        return len(filled)

    assert on_ranks(3, work) == [1, 0, 0]


def stored_as(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A reader, and the tensors of a linear in its format."""
    if name not in STORAGES:
        config, tensors, _ = read(name)
        return reader_for(config), tensors
    linear = STORAGES[name].wrap(nn.Linear(48, 36, bias=False))
    return reader_for(as_config({LAYER: linear}, [], torch.float32)), as_tensors(linear)


@pytest.mark.parametrize("name", [*STORAGES, *NAMES])
def test_what_a_reader_keeps_as_it_is_stored_has_the_bytes_of_the_file(name: str) -> None:
    """With and without its values at hand."""
    reader, tensors = stored_as(name)
    if not isinstance(reader, KeepsBytes):
        return
    kept = {suffix: buffer for suffix, buffer in reader.as_stored.items() if suffix in tensors}
    left = {suffix: each.to("meta") if suffix in kept else each for suffix, each in tensors.items()}
    whole, empty = (reader.build(LAYER, each, None, torch.float32) for each in (tensors, left))  # type: ignore[attr-defined]
    assert kept
    for suffix, buffer in kept.items():
        inside, outside = whole.get_buffer(buffer), tensors[suffix]
        assert torch.equal(inside.reshape(-1).view(torch.uint8), outside.reshape(-1).view(torch.uint8))
        assert (empty.get_buffer(buffer).shape, empty.get_buffer(buffer).is_meta) == (inside.shape, True)

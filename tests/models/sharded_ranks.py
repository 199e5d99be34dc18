"""One of two or four ranks that hold a base between them, beside the same base whole: `python -m
tests.models.sharded_ranks [storages]`; all families, too, unless only storages are wanted.

Prints a line for each thing that was compared, its name and what differed; nothing else.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.dora import DoraConfig
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.models.base import Base
from lowrank.models.checks.isolation import check_head, choose_layout
from lowrank.models.layers import decoder_layers
from lowrank.models.loading.quantize_on_load import pack_in_place
from lowrank.models.sharded import Sharded
from lowrank.objectives.sft import SFTConfig
from lowrank.ranks import Processes
from lowrank.segments import number_the_step
from lowrank.settings import configs_in
from lowrank.train.engine import Engine
from lowrank.train.lanes import ManyLanes
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.models.prequantized.test_readers import NAMES, build
from tests.tiny_models import FAMILIES, make_model, random_step

LENGTHS = [(9, 12, 3, 5, 7, 20), (30, 4, 4, 2)]
"""Of the documents of two steps; passes of at most 16 tokens, so one rank has more of them."""
STORAGES: dict[str, dict[str, Any]] = {
    "dense": {}, "nf4": {}, "nf4 double": {"double_quant": True}, "fp4": {}, "eetq": {},
    "int8": {"outlier_columns": 4}, "hqq": {"bits": 3},
}  # fmt: skip


def base_of(family: str, storage: str, dtype: torch.dtype, placement: Any = None) -> Base:
    model = make_model(family, dtype)
    name = storage.split()[0]
    if name != "dense":
        pack_in_place(model, configs_in("lowrank.models.storages")[name](**STORAGES[storage]))  # type: ignore[arg-type]
    if placement is not None:
        layers = decoder_layers(model)
        assert layers is not None
        for layer in layers:
            placement.keep(layer)
    base = Base(model, None, family, placement=placement)
    check_head(base)
    choose_layout(base, "auto")
    return base


def trained(base: Base, ranks: Any) -> dict[str, Any]:
    """Two steps of two jobs, and an evaluation: numbers and tensors."""
    engine = Engine(base, Bank(base), 16)
    engine.lanes = ManyLanes(ranks, 4, in_step=base.placement.in_step)
    slots = []
    for seed, config in enumerate((LoraConfig(rank=4, dropout=0.1), DoraConfig(rank=4))):
        slots.append(engine.bank.add(config, seed=seed))
        engine.add(slots[-1], SFTConfig().build(), AdamWConfig(), seed=seed, neftune_alpha=5.0 * seed)
    found: dict[str, Any] = {}
    for number, lengths in enumerate(LENGTHS):
        # the second job is in the last lanes alone, so in some passes only one of the two has a part
        work = {
            slots[0]: number_the_step(random_step(number, lengths)),
            slots[1]: number_the_step(random_step(7, (6,))),
        }
        done = engine.forward_backward(work)
        found |= {f"loss {number} {slot}": each.loss for slot, each in done.items()}
        found |= {f"norm {number} {slot}": engine.optim_step(slot, 0.01).grad_norm for slot in slots}
    found |= {f"eval {slot}": each.loss for slot, each in engine.evaluate({slots[0]: random_step(9, (5, 30))}).items()}
    found["logprobs"] = torch.cat([torch.from_numpy(each) for each in engine.logprobs(-1, random_step(3, (9, 20, 4)))])
    for slot in slots:
        found |= {f"{slot} {name}": each.detach() for name, each in engine.bank.parameters(slot).items()}
    return found


def held(model: nn.Module) -> int:
    """Bytes of this rank's parameters."""
    tensors = [getattr(each, "_local_tensor", each) for each in (*model.parameters(), *model.buffers())]
    return sum(each.numel() * each.element_size() for each in tensors)


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    assert one.keys() == other.keys()
    same = {
        name: torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    }
    return [name for name, equal in same.items() if not equal]


def compare(family: str, storage: str, dtype: torch.dtype, ranks: Any) -> str:
    whole = base_of(family, storage, dtype)
    size = held(whole.model)
    expected = trained(whole, ranks)
    base = base_of(family, storage, dtype, Sharded(torch.device("cpu"), ranks.world, ranks.world))
    part = held(base.model)
    different = differing(trained(base, ranks), expected)
    return f"{len(different)} of {len(expected)} differ {different[:3]}, {part / size:.2f} of the bytes"


def gathered_weight(name: str) -> str:
    """A layer of a fixture's storage, cut and gathered again."""
    # with a norm beside it, as in every decoder layer: a group of 8-bit floats alone would travel as such, not as bytes
    plain, holder = build(name, torch.float32), nn.Sequential(build(name, torch.float32), nn.LayerNorm(4))
    placement = Sharded(torch.device("cpu"), dist.get_world_size(), dist.get_world_size())
    placement.keep(holder)
    gathered: Any = holder
    gathered.unshard()
    equal = torch.equal(gathered[0].dense_weight(), plain.dense_weight())
    gathered.reshard()
    return "0 differ" if equal else "1 differs"


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Processes()

    def show(name: str, text: str) -> None:
        if ranks.rank == 0:
            print(f"{name}: {text}", flush=True)

    for storage in STORAGES:
        for dtype in (torch.float32, torch.bfloat16):
            show(f"llama {storage} {dtype}", compare("llama", storage, dtype, ranks))
    for family in () if sys.argv[1:] == ["storages"] else FAMILIES:
        try:
            base_of(family, "dense", torch.float32)
        except Exception as error:  # padded ones too; what is refused whole needs no parts
            show(family, f"refused: {error}")
            continue
        show(family, compare(family, "dense", torch.float32, ranks))
        show(f"{family} nf4", compare(family, "nf4", torch.float32, ranks))
    for name in NAMES:
        show(name, gathered_weight(name))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())

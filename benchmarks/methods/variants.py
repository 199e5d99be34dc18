"""The table of adapter variants.

A random Llama in float64, three documents. The adapter is moved away from its start by random numbers, saved, and
loaded by PEFT; outputs of every layer are compared, then the gradients of one loss. PiSSA and OLoRA are compared with
PEFT's LoRA on the base that PEFT would have altered.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peft
import torch

from benchmarks.methods.costs import against, base_of_the_tables, costs, link, summary_of
from lowrank.adapters.bank import Bank
from lowrank.adapters.routing import ForwardContext
from lowrank.adapters.variants import ABSENT
from lowrank.adapters.variants.base import Variant
from tests.adapters.peft_twins import VARIANTS, config_of, moved, twin_of
from tests.peft_oracle import plain_loss
from tests.tiny_models import make_base, make_engine, random_step

HEAD = """## Adapter variants

`adapter: {{type: ...}}`. Any of them may stand beside any other in one run, on every storage. *Path*: `fast` rides the
routed linear; `own` runs its own formula for its rows; `own x2` multiplies with the base weight twice. *Trained*:
parameters against `lora` of rank 4, on a model of width 32 (OFT's blocks: 8). *Outputs*, *gradients*: the largest
difference from PEFT {version} on the same tensors in float64, of a layer's output and of a loss's gradients, relative
to the largest value. `loftq` differs from `lora` only in its start, and needs a quantized base; `eva` in its start and
its ranks, which equal PEFT's (tests/adapters/test_eva.py); `adalora` is held to the weights that PEFT's allocator gives
after 50 steps (tests/adapters/test_adalora.py). *Time*, *kept*: CPU
time of an optimizer step, and bytes kept for its backward pass, against `lora`'s at the same rank (16), on a Llama
of width 512 with 2 layers, 512 tokens, float32, one thread; the smallest of 6, interleaved. `rslora` does the work of
`lora`: its distance from 1 is the noise of the machine. `rsdora` is `dora` with the scale of `rslora`.

| type | in a word | when | paper | path | trained | time | kept | in PEFT's files | outputs | gradients |
|---|---|---|---|---|---|---|---|---|---|---|
"""

TAIL = """
Settings for all of them: `loraplus_lr_ratio` (LoRA+, arXiv:2402.12354), `rank_pattern`, `target_modules`,
`modules_to_save`; with those that are saved as LORA also `trainable_token_indices`, rows of single tokens, for bases
that `lowrank vocab` gave new ones. `lora` and `rslora` also go to heads, embeddings and, by `target_parameters`, to the
fused experts of mixtures.

Not there, and why:

"""


def measure(name: str) -> tuple[float, float, int]:
    """(difference of outputs, of gradients, trained parameters) of one variant."""
    engine, (slot,) = make_engine(make_base("llama"), config_of(name))
    moved(engine.bank, slot, 0.1)
    with tempfile.TemporaryDirectory() as folder:
        twin, theirs = twin_of(engine.bank, slot, Path(folder) / "adapter")
    ours = engine.bank.parameters(slot)
    difference = max(_output_difference(engine.bank, slot, path, twin) for path in engine.bank.slots[slot].layers)
    work = random_step(0, [5, 9, 14])
    plain_loss(twin, work).backward()
    engine.forward_backward({slot: work})
    gradients = max(_relative(_gradient(value), _gradient(theirs[key])) for key, value in ours.items())
    return difference, gradients, sum(value.numel() for value in ours.values())


@torch.no_grad()
def _output_difference(bank: Bank, slot: int, path: str, twin: Any) -> float:
    """Of one layer on the same input. Logits would say less: the model's norms round to float32 on the way."""
    layer = bank.base.model.get_submodule(path)
    x_TD = torch.randn(10, layer.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with bank.routing.using(ForwardContext(10, ((slot, 0, 10),))):
        return _relative(layer(x_TD), twin.base_model.model.get_submodule(path)(x_TD))


def _gradient(value: torch.Tensor) -> torch.Tensor:
    assert value.grad is not None
    return value.grad


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _path(name: str, config: Any) -> str:
    if name in ("ia3", "oft"):
        return "own x2" if name == "oft" else "own (x2 in feed-forward)"
    if name in ("dora", "rsdora"):
        return "fast (own x2 with dropout)"
    return "own" if type(config().build()).as_low_rank is Variant.as_low_rank else "fast"


def _row(name: str, of_lora: int, found: dict[str, tuple[float, int]]) -> str:
    config = VARIANTS[name]
    saved = config().as_saved()
    form = f"LORA, {'2R' if name in ('pissa', 'olora') else 'R'}" if saved.peft.type == "LORA" else saved.peft.type
    if config.needs_quantized or name == "adalora":
        numbers, share = "| - | - |", 1.0
    else:
        difference, gradients, trained = measure(name)
        numbers, share = f"| {difference:.0e} | {gradients:.0e} |", trained / of_lora
    cost = against(found, name if name in found else "lora", "lora")
    return (
        f"| `{name}` | {summary_of(config)} | {config.when} | {link(config.paper)} | {_path(name, config)} | "
        f"{share:.0%} | {cost} | {form} {numbers}"
    )


def page() -> str:
    """The section, in Markdown."""
    engines = {}
    for name, config in VARIANTS.items():
        if not config.needs_quantized:
            own = {"block_size": 16} if name == "oft" else {"rank": 16}
            engine, (slot,) = make_engine(base_of_the_tables(), config(**own))
            engines[name] = (engine, slot, random_step(1, [128] * 4))
    found, of_lora = costs(engines), measure("lora")[2]
    rows = "\n".join(_row(name, of_lora, found) for name in VARIANTS)
    absent = "".join(f"- `{name}`: {reason}.\n" for name, reason in ABSENT.items())
    return HEAD.format(version=peft.__version__) + rows + "\n" + TAIL + absent

"""Writes docs/methods.md: every adapter variant and objective, how far it is from its peer, what it costs against lora.

    python -m benchmarks.methods > docs/methods.md

A random Llama in float64, three documents. The adapter is moved away from its start by random numbers, saved, and
loaded by PEFT; outputs of every layer are compared, then the gradients of one loss. PiSSA and OLoRA are compared with
PEFT's LoRA on the base that PEFT would have altered. Objectives: the batches and peers of tests/objectives/test_trl.py.
"""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants import ABSENT
from lowrank.objectives import orpo
from lowrank.records import BARE_BASE
from lowrank.settings import configs_in
from tests.adapters.peft_twins import ALL, VARIANTS, config_of, moved, twin_of
from tests.adapters.test_prompts import PROMPTS, Peer, peer_of
from tests.objectives import trl_peers
from tests.objectives.test_trl import CASES, engine_for, rows
from tests.peft_oracle import plain_loss
from tests.tiny_models import make_base, make_engine, make_model, random_step

HEAD = """# Methods

Written by `python -m benchmarks.methods > docs/methods.md`.

## Adapter variants

`adapter: {{type: ...}}`. Any of them may stand beside any other in one run, on every storage. *Path*: `fast` rides the
routed linear; `own` runs its own formula for its rows; `own x2` multiplies with the base weight twice. *Trained*:
parameters against `lora` of rank 4, on a model of width 32 (OFT's blocks: 8). *Outputs*, *gradients*: the largest
difference from PEFT {version} on the same tensors in float64, of a layer's output and of a loss's gradients, relative
to the largest value. `loftq` differs from `lora` only in its start, and needs a quantised base; `eva` in its start and
its ranks, which equal PEFT's (tests/adapters/test_eva.py); `adalora` is held to the weights that PEFT's allocator gives
after 50 steps (tests/adapters/test_adalora.py). *Time*, *kept*: CPU
time of an optimiser step, and bytes kept for its backward pass, against `lora`'s at the same rank (16), on a Llama
of width 512 with 2 layers, 512 tokens, float32, one thread; the smallest of 6, interleaved. `rslora` does the work of
`lora`: its distance from 1 is the noise of the machine.

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
    bank.routing.set(10, ((slot, 0, 10),))
    return _relative(layer(x_TD), twin.base_model.model.get_submodule(path)(x_TD))


def _gradient(value: torch.Tensor) -> torch.Tensor:
    assert value.grad is not None
    return value.grad


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _path(name: str, config: Any) -> str:
    if name in ("ia3", "oft"):
        return "own x2" if name == "oft" else "own (x2 in feed-forward)"
    if name == "dora":
        return "fast (own x2 with dropout)"
    return "own" if config.peft_type in ("LOHA", "LOKR") else "fast"


SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 4}
LENGTHS = [128] * 4


def costs(names: list[str]) -> dict[str, tuple[float, int]]:
    """(CPU seconds of an optimiser step, bytes kept for its backward pass) of each variant."""
    engines = {}
    for name in names:
        own = {"block_size": 16} if name == "oft" else {"rank": 16}
        base = make_base("llama", torch.float32, **SHAPE, head_dim=64, max_position_embeddings=256)
        engine, (slot,) = make_engine(base, VARIANTS[name](**own))
        engines[name] = (engine, slot, _step(engine, slot), _kept(engine, slot))
    best = {name: first for name, (_, _, first, _) in engines.items()}
    for _ in range(5):
        for name, (engine, slot, _, _) in engines.items():
            best[name] = min(best[name], _step(engine, slot))
    return {name: (best[name], kept) for name, (_, _, _, kept) in engines.items()}


def _step(engine: Any, slot: int) -> float:
    start = time.process_time()
    engine.forward_backward({slot: random_step(1, LENGTHS)})
    engine.optim_step(slot, 1e-4)
    return time.process_time() - start


def _kept(engine: Any, slot: int) -> int:
    seen: dict[int, int] = {}
    mine = {parameter.untyped_storage().data_ptr() for parameter in engine.base.model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        engine.forward_backward({slot: random_step(1, LENGTHS)})
    engine.optim_step(slot, 1e-4)
    return sum(seen.values())


PROMPT_HEAD = """
## Virtual tokens

`adapter: {type: ..., num_virtual_tokens: 20}`. Trained vectors before every document; no layer changes. They train
beside any other adapter, in the packed layout, and are served by `lowrank serve` and PEFT; nothing can merge them, so
there is no GGUF. *Loss*, *gradients*: the largest difference from PEFT on the same vectors in float64, of gradients
relative to the largest value.

| type | in a word | when | paper | in PEFT's files | loss | gradients |
|---|---|---|---|---|---|---|
"""


def _prompt_row(name: str) -> str:
    engine, (slot,) = make_engine(make_base("llama"), PROMPTS[name])
    ours = engine.bank.parameters(slot)
    twin, theirs = peer_of(name, "llama", ours)
    work = random_step(0, [5, 9, 14])
    loss = plain_loss(Peer(twin), work)
    loss.backward()
    apart = abs(engine.forward_backward({slot: work})[slot].loss - loss.item())
    gradients = max(_relative(_gradient(value), _gradient(theirs[key])) for key, value in ours.items())
    config = ALL[name]
    link = f"[{config.paper}](https://arxiv.org/abs/{config.paper.removeprefix('arXiv:')})"
    summary = (config.__doc__ or "").strip().split(":")[0].split(",")[0]
    form = config().as_saved().peft_type
    return f"| `{name}` | {summary} | {config.when} | {link} | {form} | {apart:.0e} | {gradients:.0e} |"


OBJECTIVES = """
## Objectives

`objective: {type: ...}`. Jobs of one run may have different ones. *Loss*, *gradients*: the largest difference from
TRL's own trainer on the same random rows in float32, ours cut into several batches; gradients relative to the
largest value. `sft` and `pretrain` are compared with transformers' loss. `reward` is held to 1e-5 of RewardTrainer by
tests/objectives/test_trl.py, which runs all of these on real rows too.

| type | in a word | needs | peer | loss | gradients |
|---|---|---|---|---|---|
"""
_PEERS = {"dpo": "DPOTrainer", "simpo": "CPOTrainer", "cpo": "CPOTrainer", "kto": "KTOTrainer", "orpo": "ORPOTrainer"}


def _objective_difference(objective: Any, peer: Any, segments: list[Any]) -> tuple[float, float]:
    """(of the loss, of the gradients), relative."""
    model = make_model("llama", torch.float32, initializer_range=0.2, tie_word_embeddings=False)
    theirs = copy.deepcopy(model).requires_grad_(True)
    loss, _ = peer(theirs, segments)
    loss.backward()
    engine = engine_for(model, objective, max(map(len, segments)) * 3)
    forwarded = engine.forward_backward({BARE_BASE: segments})[BARE_BASE]
    expected = {name: value.grad for name, value in theirs.named_parameters() if value.grad is not None}
    scale = max(float(value.abs().max()) for value in expected.values())
    own = engine.jobs[BARE_BASE].parameters
    largest = max(float((_gradient(own[name]) - value).abs().max()) for name, value in expected.items())
    return abs(forwarded.loss - loss.item()) / abs(loss.item()), largest / scale


def _objective_rows() -> list[str]:
    lines = []
    for name, config in configs_in("lowrank.objectives").items():
        cases = [case for case in CASES if case.partition("-")[0] == name]
        found = [_objective_difference(*CASES[case], rows(CASES[case][0], 0)) for case in cases]
        peer = _PEERS.get(name, "transformers")
        if name == "orpo":
            own = orpo.Config(beta=0.3).build()
            found = [_objective_difference(own, lambda m, s: trl_peers.orpo(m, s, 0.3), rows(own, 0, prompt=1))]
        elif name in ("sft", "pretrain"):
            plain = lambda m, s: (plain_loss(m, s), {})  # noqa: E731
            found = [_objective_difference(config().build(), plain, random_step(0, [5, 9, 14]))]
        numbers = f"{max(a for a, _ in found):.0e} | {max(b for _, b in found):.0e}" if found else "- | -"
        peer = "RewardTrainer" if name == "reward" else peer
        record = config().build().record.__name__
        summary = (config.__doc__ or "").strip().split(". ")[0].rstrip(".")
        forms = f" ({len(cases)} forms)" if len(cases) > 1 else ""
        lines.append(f"| `{name}` | {summary} | {record} | {peer}{forms} | {numbers} |")
    return lines


def _row(name: str, of_lora: int, cost: dict[str, tuple[float, int]]) -> str:
    config = VARIANTS[name]
    saved = config().as_saved()
    form = f"LORA, {'2R' if name in ('pissa', 'olora') else 'R'}" if saved.peft_type == "LORA" else saved.peft_type
    summary = (config.__doc__ or "").strip().split(". ")[0].split(";")[0].rstrip(".")
    if config.needs_quantised or name == "adalora":
        numbers, share = "| - | - |", 1.0
    else:
        difference, gradients, trained = measure(name)
        numbers, share = f"| {difference:.0e} | {gradients:.0e} |", trained / of_lora
    link = f"[{config.paper}](https://arxiv.org/abs/{config.paper.removeprefix('arXiv:')})"
    path = _path(name, config)
    own = cost.get(name, cost["lora"])
    costs_of = " | ".join(f"{mine / lora:.2f}" for mine, lora in zip(own, cost["lora"]))
    return f"| `{name}` | {summary} | {config.when} | {link} | {path} | {share:.0%} | {costs_of} | {form} {numbers}"


def main() -> None:
    """Print the page."""
    warnings.simplefilter("ignore")
    of_lora = measure("lora")[2]
    print(HEAD.format(version=peft.__version__), end="")
    torch.set_num_threads(1)
    cost = costs([name for name, config in VARIANTS.items() if not config.needs_quantised])
    for name in VARIANTS:
        print(_row(name, of_lora, cost))
    print(TAIL, end="")
    for name, reason in ABSENT.items():
        print(f"- `{name}`: {reason}.")
    print(PROMPT_HEAD, end="")
    for name in PROMPTS:
        print(_prompt_row(name))
    print(OBJECTIVES, end="")
    print("\n".join(_objective_rows()))


if __name__ == "__main__":
    main()

"""The table of bottleneck adapters, against what AdapterHub's library gave (tests/adapters/bottleneck)."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from benchmarks.methods.costs import link, summary_of
from lowrank.adapters.bank import Bank
from lowrank.checkpoints.peft_layout import load_adapter
from tests.adapters.bottleneck.test_bottleneck import FIXTURES, VARIANTS, base_of, logits

HEAD = """
## Bottleneck adapters

`adapter: {type: ..., reduction_factor: 16}`, settings and files by AdapterHub's names (`adapters` 1.3.0, which reads
ours and whose files are read). Small networks behind the attention or the MLP of every layer, which stay there: nothing
can merge them, so there is no GGUF and no vLLM; `lowrank serve`, `chat` and `predict` run them. They train beside any
other adapter, on every storage, in both layouts. Not on models whose blocks add the stream around them themselves
(BLOOM, MPT) or whose MLP is no block (OPT). *Outputs*, *gradients*: the largest difference from `adapters` on the same
tensors, of logits and of a loss's gradients, relative to the largest value (its Llama rounds norms to float32).

| type | in a word | when | paper | outputs | gradients |
|---|---|---|---|---|---|
"""


def _row(name: str) -> str:
    expected = load_file(FIXTURES / "llama" / f"{name}.safetensors")
    saved = load_adapter(FIXTURES / "llama" / name)
    bank = Bank(base_of("llama"))
    slot = bank.add(saved.config, seed=0)
    bank.load(slot, saved.tensors)
    ours, own = logits(bank, slot), bank.parameters(slot)
    gradients = dict(zip(own, torch.autograd.grad(ours.pow(2).sum(), list(own.values()))))
    theirs = {key.replace(f".adapters.{name}.", "."): value for key, value in expected.items()}
    apart = max(_relative(gradient, theirs[key]) for key, gradient in gradients.items())
    config = VARIANTS[name]
    return (
        f"| `{name}` | {summary_of(type(config))} | {config.when} | {link(config.paper)} | "
        f"{_relative(ours, expected['logits']):.0e} | {apart:.0e} |"
    )


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def page() -> str:
    """The section, in Markdown."""
    return HEAD + "".join(f"{_row(name)}\n" for name in VARIANTS)

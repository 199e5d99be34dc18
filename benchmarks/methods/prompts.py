"""The table of virtual tokens: prompt tuning, P-tuning, prefix tuning."""

from __future__ import annotations

from benchmarks.methods.costs import link, summary_of
from tests.adapters.peft_twins import ALL
from tests.adapters.prompts.cases import PROMPTS, Peer, peer_of
from tests.peft_oracle import plain_loss
from tests.tiny_models import make_base, make_engine, random_step

HEAD = """
## Virtual tokens

`adapter: {type: ..., num_virtual_tokens: 20}`. Trained vectors before every document; no layer changes. They train
beside any other adapter, in the packed layout, and are served by `lowrank serve` and PEFT; nothing can merge them, so
there is no GGUF. *Loss*, *gradients*: the largest difference from PEFT on the same vectors in float64, of gradients
relative to the largest value.

| type | in a word | when | paper | in PEFT's files | loss | gradients |
|---|---|---|---|---|---|---|
"""


def _row(name: str) -> str:
    engine, (slot,) = make_engine(make_base("llama"), PROMPTS[name])
    ours = engine.bank.parameters(slot)
    twin, theirs = peer_of(name, "llama", ours)
    work = random_step(0, [5, 9, 14])
    loss = plain_loss(Peer(twin), work)
    loss.backward()
    apart = abs(engine.forward_backward({slot: work})[slot].loss - loss.item())
    largest = 0.0
    for key, value in ours.items():
        mine, other = value.grad, theirs[key].grad
        assert mine is not None
        assert other is not None
        largest = max(largest, float((mine - other).abs().max() / other.abs().max()))
    config = ALL[name]
    form = config().as_saved().peft.type
    return (
        f"| `{name}` | {summary_of(config)} | {config.when} | {link(config.paper)} | {form} | "
        f"{apart:.0e} | {largest:.0e} |"
    )


def page() -> str:
    """The section, in Markdown."""
    return HEAD + "".join(f"{_row(name)}\n" for name in PROMPTS)

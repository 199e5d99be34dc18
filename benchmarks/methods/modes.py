"""The table of tuning modes, and of settings of the base that change what is computed in training."""

from __future__ import annotations

from typing import Any

from benchmarks.methods.costs import against, base_of_the_tables, costs, link
from lowrank.adapters.bank import Bank
from lowrank.batches import BASE_SLOT
from lowrank.contrib.layer_wrappers.mixture_of_depths import MixtureOfDepthsConfig
from lowrank.models.config import FreezeConfig
from lowrank.models.freezing import train_only
from lowrank.models.layer_wrappers import wrap
from lowrank.objectives.sft import SFTConfig
from lowrank.train.engine import Engine
from lowrank.train.optimizers import bytes_of_state
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.adapters.peft_twins import VARIANTS
from tests.tiny_models import make_engine, random_step

HEAD = """
## Tuning modes

`tuning:`, and settings of the base that change what is trained or how. *Time*, *kept*: as in the first table, against
`lora` of rank 16, on documents of 512 tokens; the update is in the time. *State*: megabytes of moments and gradients of
that model (float32, so masters cost nothing).

| setting | in a word | when | paper | time | kept | state | checked against |
|---|---|---|---|---|---|---|---|
"""
_MODES = {
    "tuning: adapter": ("adapters on a frozen base", "the default", "", "PEFT, see above"),
    "tuning: full": ("all parameters", "much data, much memory", "", "transformers' loss and gradients; torch's AdamW"),
    "tuning: freeze": (
        "some layers; here the last of two",
        "full tuning where memory is short",
        "",
        "parameters outside stay equal to the bit",
    ),
    "tuning: freeze, spread": (
        "the blocks that `lowrank expand` inserted (LLaMA Pro)",
        "new knowledge, keeping the old",
        "arXiv:2401.02415",
        "the expanded model's logits equal the base's to the bit",
    ),
    "model.layer_wrapper: mixture_of_depths": (
        "all parameters; every second layer sees an eighth of a document's tokens (Mixture-of-Depths)",
        "continued pre-training of a model that runs in lowrank alone",
        "arXiv:2404.02258",
        "the definition, written out with the model's own layers",
    ),
    "optimizer.layerwise: true": (
        "all parameters, each updated within the backward pass",
        "full tuning without room for the model's gradients",
        "arXiv:2306.09782",
        "updates afterwards, to the bit",
    ),
    "model.shift_attn: 128": (
        "shifted sparse attention in training (LongLoRA)",
        "documents several times longer than the base's",
        "arXiv:2309.12307",
        "softmax under an explicit mask",
    ),
    "model.rope_scaling": (
        "rotary embedding stretched: linear, yarn, llama3",
        "documents longer than the base's",
        "arXiv:2309.00071",
        "transformers, which computes it",
    ),
    "neftune_noise_alpha": (
        "noise on the input embeddings (NEFTune)",
        "few examples to learn answers from",
        "arXiv:2310.05914",
        "its variance; draws by counter",
    ),
}


_OF_THE_BASE = ("tuning: full", "tuning: freeze", "model.layer_wrapper: mixture_of_depths", "optimizer.layerwise: true")
"""Those that train the base's own parameters."""


def page() -> str:
    """The section, in Markdown."""
    engines = {name: found for name in _MODES if (found := _engine(name)) is not None}
    cost = costs(engines)
    lines = []
    for name, (summary, when, paper, peer) in _MODES.items():
        like = "freeze" if "freeze" in name else "adapter"
        numbers = f"as {like} | as {like} | as {like}"
        if name in engines:
            job = engines[name][0].jobs[engines[name][1]]
            whole = job.layerwise is None
            gradients = sum(4 * value.numel() for value in job.parameters.values()) if whole else 0
            numbers = (
                f"{against(cost, name, 'tuning: adapter')} | {(bytes_of_state(job.optimizer) + gradients) / 1e6:.1f}"
            )
        lines.append(f"| `{name}` | {summary} | {when} | {link(paper)} | {numbers} | {peer} |")
    return HEAD + "\n".join(lines) + "\n"


def _engine(name: str) -> Any:
    """(engine, slot, work); None for what costs as much as another."""
    base, work = base_of_the_tables(), random_step(1, [512])
    if "spread" in name or "rope" in name:
        return None
    if name in _OF_THE_BASE:
        base.model.requires_grad_(True)
        if "freeze" in name:
            train_only(base.model, FreezeConfig(trainable_layers=1))
        if "depths" in name:
            base.layer_wrapper = wrap(base.model, MixtureOfDepthsConfig())
        engine = Engine(base, Bank(base), 4096)
        optimizer: Any = AdamWConfig(layerwise=True, max_grad_norm=None) if "layerwise" in name else AdamWConfig()
        engine.add(BASE_SLOT, SFTConfig().build(), optimizer, seed=0, neftune_alpha=0.0)
        return engine, BASE_SLOT, work
    base.shift_attn = 128 if "shift" in name else None
    engine, (slot,) = make_engine(base, VARIANTS["lora"](rank=16))
    if "neftune" in name:
        engine.jobs[slot].neftune_alpha = 5.0
        engine.bank.enable_noise()
    return engine, slot, work

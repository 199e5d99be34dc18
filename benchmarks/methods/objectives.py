"""The table of objectives: the batches and peers of tests/objectives, and what a step costs against sft."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.methods.costs import against, base_of_the_tables, costs, link, summary_of
from lowrank.batches import BASE_SLOT
from lowrank.models.base import Base
from lowrank.models.checks.isolation import choose_layout
from lowrank.objectives import grpo, orpo
from lowrank.objectives.sft import SFTConfig
from lowrank.segments import CHOSEN, REJECTED, Segment, number_the_step
from lowrank.settings import configs_in
from tests.adapters.peft_twins import VARIANTS
from tests.objectives import trl_peers
from tests.objectives.test_grpo import CASES as GRPO_CASES
from tests.objectives.test_grpo import answers as drawn_answers
from tests.objectives.test_llamafactory_losses import CASES as LOSS_CASES
from tests.objectives.test_llamafactory_losses import learned
from tests.objectives.test_llamafactory_losses import rows as loss_rows
from tests.objectives.test_trl import CASES, engine_for, rows
from tests.peft_oracle import plain_loss
from tests.tiny_models import make_engine, make_model, random_step

HEAD = """
## Objectives

`objective: {type: ...}`. Jobs of one run may have different ones. *Loss*, *gradients*: the largest difference from
TRL's own trainer on the same random rows in float32, ours cut into several batches; gradients relative to the
largest value. `sft` and `pretrain` are compared with transformers' loss, `reward` is held to 1e-5 of RewardTrainer by
tests/objectives/test_trl.py, which runs all of these on real rows too, and `ppo` to 1e-5 of the pieces of TRL 0.11.4's
PPOTrainer (the last that had them) by tests/objectives/test_ppo.py. *Time*, *kept*: CPU time of an optimizer step and
bytes kept for its backward pass against `sft` on the same tokens, on the model of the first table; for pairs, prompts
of 96 tokens with two answers of 32, whose prompt is computed once. Drawing answers, for `grpo` and `ppo`, is not in it.

| type | in a word | when | paper | needs | time | kept | peer | loss | gradients |
|---|---|---|---|---|---|---|---|---|---|
"""
LOSSES = """
Other losses of `sft` (`objective: {type: sft, loss_type: ...}`; `label_smoothing` is a setting of `sft` and of
`pretrain`). *Loss*, *gradients*: from the published formula on whole logits of the same rows, those of
tests/objectives/test_llamafactory_losses.py; of `asft` with another model as reference. *Time*, *kept*: as above,
against `nll`; `asft` asks the bare base in the same step.

| loss | in a word | when | paper | time | kept | loss | gradients |
|---|---|---|---|---|---|---|---|
"""
_LOSSES = {
    "dft": ("each token weighed by its own probability", "answers that the model finds unlikely should pull less",
            "2508.05629"),
    "asft": ("dft, held to the base by a KL divergence", "dft that drifts too far from what the base knew",
             "2509.23753"),
    "eaft": ("each token weighed by how undecided the model is", "new knowledge without unlearning what the model is "
             "sure of", "2601.02151"),
    "smoothed": ("`label_smoothing: 0.1`: a share of every target goes to all tokens", "noisy answers", "1512.00567"),
}  # fmt: skip
_PEERS = {
    "dpo": "DPOTrainer",
    "simpo": "CPOTrainer",
    "cpo": "CPOTrainer",
    "kto": "KTOTrainer",
    "orpo": "ORPOTrainer",
    "grpo": "GRPOTrainer",
    "reward": "RewardTrainer",
    "ppo": "PPOTrainer 0.11.4",
}
_IN_PAIRS = ("cpo", "dpo", "orpo", "reward", "simpo")
_DRAWN = ("grpo", "ppo")


def page() -> str:
    """The section, in Markdown."""
    configs, found = configs_in("lowrank.objectives"), _costs()
    lines = []
    for name, config in configs.items():
        apart = _differences(name, config)
        numbers = f"{max(a for a, _ in apart):.0e} | {max(b for _, b in apart):.0e}" if apart else "1e-05 | 1e-05"
        peer = _PEERS.get(name, "transformers") + (f" ({len(apart)} forms)" if len(apart) > 1 else "")
        settings: Any = config
        lines.append(
            f"| `{name}` | {summary_of(config)} | {settings.when} | {link(settings.paper)} | "
            f"{settings().build().record.__name__} | {against(found, name, 'sft')} | {peer} | {numbers} |"
        )
    return HEAD + "\n".join(lines) + "\n" + losses()


def losses() -> str:
    """The table of sft's losses, in Markdown."""
    engines = {}
    for name in ("sft", *_LOSSES):
        own: Any = {"sft": {}, "smoothed": {"label_smoothing": 0.1}}.get(name, {"loss_type": name})
        engine, (slot,) = make_engine(base_of_the_tables(), VARIANTS["lora"](rank=16))
        engine.add(slot, SFTConfig(**own).build(), engine.jobs[slot].settings, seed=0, neftune_alpha=0.0)
        engines[name] = (engine, slot, _work("sft"))
    found, lines = costs(engines), []
    for name, (summary, when, paper) in _LOSSES.items():
        loss, gradients = _difference_of_loss(name)
        shown = "`label_smoothing`" if name == "smoothed" else f"`{name}`"
        cost = against(found, name, "sft")
        lines.append(
            f"| {shown} | {summary} | {when} | {link(f'arXiv:{paper}')} | {cost} | {loss:.0e} | {gradients:.0e} |"
        )
    return LOSSES + "\n".join(lines) + "\n"


def _difference_of_loss(name: str) -> tuple[float, float]:
    """(of the loss, of the gradients) from the published formula, relative."""
    objective, peer = LOSS_CASES[name]
    model = _random_model()
    theirs = copy.deepcopy(model).requires_grad_(True)
    other = make_model("llama", torch.float32, initializer_range=0.3, tie_word_embeddings=False).requires_grad_(False)
    work = loss_rows()
    loss = peer(*learned(theirs, work), learned(other, work)[0])
    loss.backward()
    engine = engine_for(model, objective, 16)
    engine.reference_base = Base(other, None, "other")
    choose_layout(engine.reference_base, "auto")
    forwarded = engine.forward_backward({BASE_SLOT: work})[BASE_SLOT]
    expected = {name: value.grad for name, value in theirs.named_parameters() if value.grad is not None}
    own = engine.jobs[BASE_SLOT].parameters
    scale = max(float(value.abs().max()) for value in expected.values())
    largest = max(float((own[name].grad - value).abs().max()) for name, value in expected.items())  # type: ignore[operator]
    return abs(forwarded.loss - loss.item()) / abs(loss.item()), largest / scale


def _differences(name: str, config: Any) -> list[tuple[float, float]]:
    """(of the loss, of the gradients) of each form of an objective; none where a test compares pieces."""
    if name == "grpo":
        model = _random_model()
        near = engine_for(model, grpo.GRPOConfig().build(), 400).logprobs(BASE_SLOT, drawn_answers(0, False))
        return [
            _difference(
                grpo.GRPOConfig(**ours).build(),
                partial(trl_peers.grpo, **theirs),
                drawn_answers(0, "num_iterations" in ours, near),
            )
            for ours, theirs in GRPO_CASES.values()
        ]
    if name == "orpo":
        own = orpo.ORPOConfig(beta=0.3).build()
        return [_difference(own, lambda m, s: trl_peers.orpo(m, s, 0.3), rows(own, 0, prompt=1))]
    if name in ("sft", "pretrain"):
        return [_difference(config().build(), lambda m, s: (plain_loss(m, s), {}), random_step(0, [5, 9, 14]))]
    cases = [case for case in CASES if case.partition("-")[0] == name]
    return [_difference(*CASES[case], rows(CASES[case][0], 0)) for case in cases]


def _random_model() -> Any:
    return make_model("llama", torch.float32, initializer_range=0.2, tie_word_embeddings=False)


def _difference(objective: Any, peer: Any, segments: list[Any]) -> tuple[float, float]:
    """(of the loss, of the gradients), relative."""
    model = _random_model()
    theirs = copy.deepcopy(model).requires_grad_(True)
    loss, _ = peer(theirs, segments)
    loss.backward()
    engine = engine_for(model, objective, max(map(len, segments)) * 3)
    forwarded = engine.forward_backward({BASE_SLOT: segments})[BASE_SLOT]
    expected = {name: value.grad for name, value in theirs.named_parameters() if value.grad is not None}
    scale = max(float(value.abs().max()) for value in expected.values())
    own = engine.jobs[BASE_SLOT].parameters
    largest = max(float((own[name].grad - value).abs().max()) for name, value in expected.items())  # type: ignore[operator]
    return abs(forwarded.loss - loss.item()) / abs(loss.item()), largest / scale


def _costs() -> dict[str, tuple[float, int]]:
    engines = {}
    for name, config in configs_in("lowrank.objectives").items():
        settings: Any = config
        base = base_of_the_tables()
        engine, (slot,) = make_engine(base, VARIANTS["lora"](rank=16))
        engine.shares_prompts = True
        engine.add(slot, settings().build(), engine.jobs[slot].settings, seed=0, neftune_alpha=0.0)
        engines[name] = (engine, slot, _work(name))
    return costs(engines)


def _work(name: str) -> list[Segment]:
    """512 tokens as the objective takes them: two prompts of 96 tokens, two answers of 32 to each."""
    generator = np.random.default_rng(0)
    segments = []
    for pair in range(2):
        prompt = generator.integers(3, 97, 96)
        for role in (CHOSEN, REJECTED):
            token_L = np.concatenate([prompt, generator.integers(3, 97, 32)])
            weight_L = np.concatenate([np.zeros(96), np.ones(32)]).astype(np.float32)
            signals: dict[str, Any] = (
                dict.fromkeys(("advantage", "return", "value", "logprob"), weight_L) if name in _DRAWN else {}
            )
            role_here = role if name in _IN_PAIRS or name == "kto" else 0
            pair_here = pair if name in _IN_PAIRS else -1
            segments.append(Segment(token_L, weight_L, pair_here, role_here, 0, -weight_L, signals_L=signals))
    return number_the_step(segments)

"""PPO against TRL 0.11.4, the last with a PPOTrainer whose pieces are methods, and the one LLaMA-Factory's stage has.

The numbers were recorded with its `compute_rewards`, `compute_advantages` and `loss`, in float64 on random tensors. In
the whitened case all answers have one length: TRL's whitening turns the zeros of its padding into rewards, which flow
into the advantages of shorter answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowrank.batches import Scores, pack
from lowrank.objectives.ppo import PPOConfig, whitened
from lowrank.objectives.rollout import RolloutBatch
from lowrank.segments import Segment, number_the_step

pytestmark = pytest.mark.usefixtures("allowed_code")

CASES = json.loads((Path(__file__).parent / "ppo_of_trl_0_11.json").read_text())
PROMPT = 3


def spread(values: list[float]) -> np.ndarray:
    """Numbers of an answer's tokens, after a prompt."""
    return np.concatenate([np.zeros(PROMPT), values]).astype(np.float32)


def judged(case: dict[str, Any], **settings: Any) -> tuple[Any, list[Segment]]:
    objective: Any = PPOConfig(**case["settings"], **settings).build()
    lengths = [len(each) for each in case["old"]]
    drawn = RolloutBatch(
        np.array(case["scores"])[:, None], np.ones(1), np.zeros(len(lengths), bool), np.array(lengths, np.int64)
    )
    drawn.logprob, drawn.reference, drawn.value = (
        [spread(row) for row in case[name]] for name in ("old", "reference", "value")
    )
    drawn.answer = [spread([1.0] * length) != 0 for length in lengths]
    found = objective.compute_targets(drawn).signals
    return objective, [
        Segment(np.arange(PROMPT + length), spread([1.0] * length), signals_L=signals)
        for length, signals in zip(lengths, found)
    ]


@pytest.mark.parametrize("case", CASES, ids=["plain", "whitened"])
def test_advantages_and_returns_are_trls(case: dict[str, Any]) -> None:
    _, segments = judged(case)
    for segment, advantages, returns in zip(segments, case["advantages"], case["returns"]):
        np.testing.assert_allclose(segment.signals_L["advantage"][PROMPT:], advantages, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(segment.signals_L["return"][PROMPT:], returns, rtol=1e-5, atol=1e-6)
        assert not segment.signals_L["advantage"][:PROMPT].any()


@pytest.mark.parametrize("case", CASES, ids=["plain", "whitened"])
def test_the_loss_and_its_gradients_are_trls(case: dict[str, Any]) -> None:
    objective, segments = judged(case)
    batch = pack([(0, segment) for segment in number_the_step(segments)])
    places = (batch.weight_T != 0).nonzero()[:, 0]
    leaves = {}
    for name in ("now", "vpred"):
        value_T = torch.zeros(batch.num_tokens, dtype=torch.float64)
        value_T[places] = torch.tensor(np.concatenate(case[name]))
        leaves[name] = value_T.requires_grad_()
    scores = Scores(leaves["now"], value_T=leaves["vpred"])
    loss, metrics = objective.loss(scores, batch, objective.count(batch))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-5)
    assert metrics["clip_ratio/region_mean"] > 0
    assert metrics["clip_ratio/value_mean"] > 0
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        expected = torch.tensor(np.concatenate(case[f"{name}_gradient"]))
        torch.testing.assert_close(leaf.grad[places], expected, rtol=1e-5, atol=1e-6)


def test_scores_are_normalized_when_asked() -> None:
    """Scale and offset of the scores make no difference then, and do otherwise."""
    case = {**CASES[0], "scores": [10 * each + 3 for each in CASES[0]["scores"]]}
    same = [judged(each, score_norm=True)[1] for each in (CASES[0], case)]
    for one, other in zip(*same):
        np.testing.assert_allclose(one.signals_L["return"], other.signals_L["return"], rtol=1e-4, atol=1e-5)
    assert not np.allclose(judged(CASES[0])[1][0].signals_L["return"], judged(case)[1][0].signals_L["return"])


def test_whitening_of_a_single_number_is_finite() -> None:
    assert np.isfinite(whitened(np.array([2.0]))).all()
    assert len(whitened(np.array([]))) == 0

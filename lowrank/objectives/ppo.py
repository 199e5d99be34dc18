"""Proximal policy optimization (arXiv:1707.06347, arXiv:1909.08593): a critic says how well an answer is going.

Each step the model in training answers its prompts; a reward model or reward functions score whole answers; what each
token did for the reward is estimated with a value head on the same adapter (generalized advantages, arXiv:1506.02438).
Numbers are those of TRL's PPOTrainer (0.11), which LLaMA-Factory trains with.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from lowrank.batches import Batch, Scores, Totals
from lowrank.objectives import Metrics, Objective
from lowrank.objectives.rollout import RolloutBatch, RolloutSettings, RolloutTargets
from lowrank.records import Prompted
from lowrank.settings import Positive


class PPOConfig(RolloutSettings):
    """Prompts, which the model answers itself; a reward model or reward functions judge the answers, and a value head
    learns to foresee the judgment. An optimizer step has one answer to each of `data.batch_size` prompts."""

    paper = "arXiv:1707.06347"
    when = "a reward model, or rewards that need a critic"
    type: Literal["ppo"] = "ppo"
    num_ppo_epochs: Positive = 4
    """Optimizer steps on the same answers."""
    kl_coef: float = Field(default=0.05, ge=0)
    """What each token costs for being likelier than under the bare base, which holds the model to it."""
    cliprange: float = Field(default=0.2, gt=0)
    """A token's probability may move by this share before it teaches nothing more."""
    vf_coef: float = Field(default=0.1, ge=0)
    """Weight of the value head's loss."""
    cliprange_value: float = Field(default=0.2, gt=0)
    """A value may move this far before it teaches nothing more."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """How much a reward counts one token earlier."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Between trusting the value head (0) and the rewards that came (1)."""
    score_norm: bool = False
    """Bring the scores of a step's answers to mean 0 and standard deviation 1 before anything else."""
    whiten_rewards: bool = False
    """Divide the rewards of a step's tokens, KL costs included, by their standard deviation."""

    def build(self) -> Objective:
        """A `PPO` of these settings, for one job: the engine calls its `count` and `loss`."""
        return PPO(self)


class PPO:
    """max(- r A, - clip(r) A) + vf_coef / 2 max((V - R)^2, (clip(V) - R)^2), means over the step's tokens."""

    record = Prompted
    needs = ("rollouts", "token_values")
    group = 1

    def __init__(self, config: PPOConfig) -> None:
        self.settings = config

    @property
    def steps_per_batch(self) -> int:
        """Steps on the same answers."""
        return self.settings.num_ppo_epochs

    @property
    def needs_reference(self) -> bool:
        """Only the KL cost needs it."""
        return self.settings.kl_coef > 0

    def compute_targets(self, rollouts: RolloutBatch) -> RolloutTargets:
        """Return advantages and returns of each token, with the log-probabilities and values at sampling time."""
        config = self.settings
        assert rollouts.logprob is not None
        assert rollouts.value is not None
        score_N = np.nan_to_num(rollouts.reward_N, nan=0.0)
        if config.score_norm:
            score_N = (score_N - score_N.mean()) / (score_N.std() + 1e-8)
        costs, divergence = [], []
        for place, (logprob_L, mask_L) in enumerate(zip(rollouts.logprob, rollouts.answer)):
            reference_L = logprob_L if rollouts.reference is None else rollouts.reference[place]
            divergence.append((logprob_L - reference_L)[mask_L])
            reward_A = -config.kl_coef * divergence[-1].astype(np.float64)
            reward_A[-1:] += score_N[place]
            costs.append(reward_A)
        rewards = _split(whitened(np.concatenate(costs), shift=False), costs) if config.whiten_rewards else costs
        values = [value_L[mask_L].astype(np.float64) for value_L, mask_L in zip(rollouts.value, rollouts.answer)]
        advantages = [advantages_of(*each, config.gamma, config.lam) for each in zip(rewards, values)]
        returns = [advantage_A + value_A for advantage_A, value_A in zip(advantages, values)]
        advantages = _split(whitened(np.concatenate(advantages)), advantages)
        signals = [
            {
                "advantage": _placed(advantage_A, mask_L),
                "return": _placed(return_A, mask_L),
                "value": _placed(value_A, mask_L),
                "logprob": logprob_L,
            }
            for advantage_A, return_A, value_A, logprob_L, mask_L in zip(
                advantages, returns, values, rollouts.logprob, rollouts.answer
            )
        ]
        metrics = {"kl": float(np.mean([each.sum() for each in divergence]))}
        return RolloutTargets(signals, np.ones(len(signals), bool), metrics)

    def count(self, batch: Batch) -> Totals:
        """Tokens of answers."""
        return {"answers": float(len(batch.lengths)), "tokens": float(batch.weight_T.sum())}

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """See the class."""
        config, logprob_T, tokens = self.settings, scores.logprob_T, max(totals["tokens"], 1.0)
        assert scores.value_T is not None, "the objective needs values of tokens, and there are none"
        advantage_T, return_T, old_value_T, old_T = (
            batch.signals_T[name].to(logprob_T.dtype) for name in ("advantage", "return", "value", "logprob")
        )
        weight_T = batch.weight_T.to(logprob_T.dtype)
        ratio_T = (logprob_T - old_T).exp()
        plain_T = -advantage_T * ratio_T
        clipped_T = -advantage_T * ratio_T.clamp(1 - config.cliprange, 1 + config.cliprange)
        value_T = scores.value_T.to(logprob_T.dtype)
        near_T = value_T.clamp(old_value_T - config.cliprange_value, old_value_T + config.cliprange_value)
        far_T, held_T = (value_T - return_T) ** 2, (near_T - return_T) ** 2
        policy = (weight_T * torch.maximum(plain_T, clipped_T)).sum() / tokens
        value = 0.5 * (weight_T * torch.maximum(far_T, held_T)).sum() / tokens
        metrics: Metrics = {
            "loss/policy": policy.detach(),
            "loss/value": value.detach(),
            "clip_ratio/region_mean": (weight_T * (clipped_T > plain_T)).sum() / tokens,
            "clip_ratio/value_mean": (weight_T * (held_T > far_T)).sum() / tokens,
        }
        return policy + config.vf_coef * value, metrics


def advantages_of(reward_A: np.ndarray, value_A: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Generalized advantages of the tokens of one answer; nothing comes after its last."""
    after_A = np.append(value_A[1:], 0.0)[: len(value_A)]
    delta_A = reward_A + gamma * after_A - value_A
    advantage_A, running = np.zeros_like(delta_A), 0.0
    for place in reversed(range(len(delta_A))):
        running = delta_A[place] + gamma * lam * running
        advantage_A[place] = running
    return advantage_A


def whitened(value_K: np.ndarray, shift: bool = True) -> np.ndarray:
    """Divided by the standard deviation (of a sample); with `shift` the mean is taken off."""
    mean = value_K.mean() if len(value_K) else 0.0
    variance = value_K.var(ddof=1) if len(value_K) > 1 else 0.0
    scaled_K = (value_K - mean) / np.sqrt(variance + 1e-8)
    return scaled_K if shift else scaled_K + mean


def _split(value_K: np.ndarray, like: list[np.ndarray]) -> list[np.ndarray]:
    return np.split(value_K, np.cumsum([len(each) for each in like])[:-1])


def _placed(value_A: np.ndarray, mask_L: np.ndarray) -> np.ndarray:
    """Numbers of an answer's tokens at their places in the segment."""
    placed_L = np.zeros(len(mask_L), np.float32)
    placed_L[mask_L] = value_A
    return placed_L

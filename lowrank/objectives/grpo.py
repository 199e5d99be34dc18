"""Group relative policy optimization (arXiv:2402.03300): of several answers to a prompt, the better ones gain.

Each step the model in training answers its prompts several times; reward functions score the answers; an answer's
advantage is how far its reward lies above its group's mean. Variants are TRL's: Dr. GRPO (arXiv:2503.20783), DAPO
(arXiv:2503.14476), GSPO (arXiv:2507.18071).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from lowrank.batches import Batch, Scores, Totals
from lowrank.objectives import Metrics, Objective
from lowrank.objectives.rollout import RolloutBatch, RolloutSettings, RolloutTargets, group_advantages, per_token_kl
from lowrank.objectives.sequence_loss import per_segment, reference_of, tokens_per_segment
from lowrank.records import Prompted
from lowrank.settings import Positive


class GRPOConfig(RolloutSettings):
    """Prompts, which the model answers itself: several answers to each, and reward functions that tell good from bad.
    An optimizer step has `data.batch_size` prompts with `num_generations` answers each."""

    paper = "arXiv:2402.03300"
    when = "answers that a function can check; no critic"
    type: Literal["grpo"] = "grpo"
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Answers to each prompt; they are compared with one another."""
    num_iterations: Positive = 1
    """Optimizer steps on the same answers (mu in the paper)."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the bare base, which holds the model to it; 0.04 in the paper, and 0 (the base
    is not asked at all) is usual today."""
    epsilon: float = Field(default=0.2, gt=0)
    """An answer's probability may move by this share before it teaches nothing more; counts with num_iterations > 1."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """The same upwards, where it differs; DAPO has 0.28."""
    delta: float | None = Field(default=None, gt=0)
    """A second limit upwards, of the ratio itself, for answers with negative advantage (arXiv:2505.07291)."""
    loss_type: Literal["grpo", "dr_grpo", "bnpo", "dapo"] = "dapo"
    """How tokens are averaged. grpo: over each answer, then over answers (short answers weigh more per token). dr_grpo:
    over answers times max_completion_length. dapo: over all tokens of the step; bnpo is the same here, since a step's
    totals never depend on micro-batches."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation of the group's rewards, of the step's, or nothing (true
    and false stand for group and none)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratios to the old probability for each token (GRPO), or one for the whole answer (GSPO)."""
    mask_truncated_completions: bool = False
    """Learn nothing from answers that were cut off at max_completion_length."""

    @field_validator("scale_rewards", mode="before")
    @classmethod
    def _true_or_false(cls, value: Any) -> Any:
        return {True: "group", False: "none"}[value] if isinstance(value, bool) else value

    def build(self) -> Objective:
        """A `GRPO` of these settings, for one job: the engine calls its `count` and `loss`."""
        return GRPO(self)


class GRPO:
    """- min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta KL, over tokens; r = p / p when it was sampled."""

    record = Prompted
    needs = ("rollouts",)

    def __init__(self, config: GRPOConfig) -> None:
        self.settings = config

    @property
    def group(self) -> int:
        """Answers to each prompt."""
        return self.settings.num_generations

    @property
    def steps_per_batch(self) -> int:
        """Steps on the same answers."""
        return self.settings.num_iterations

    @property
    def needs_reference(self) -> bool:
        """Only the KL term needs it."""
        return self.settings.beta > 0

    def compute_targets(self, rollouts: RolloutBatch) -> RolloutTargets:
        """Return advantages, and old log-probabilities where answers are used more than once."""
        advantage_N, std_N = group_advantages(rollouts.reward_N, self.group, self.settings.scale_rewards)
        signals: list[dict[str, np.ndarray]] = [{"advantage": value} for value in advantage_N]
        if rollouts.logprob is not None:
            for of_answer, logprob_L in zip(signals, rollouts.logprob):
                of_answer["logprob"] = logprob_L
        learned_N = ~rollouts.cut_N if self.settings.mask_truncated_completions else np.ones_like(rollouts.cut_N)
        return RolloutTargets(signals, learned_N, {"frac_reward_zero_std": float(np.isclose(std_N, 0).mean())})

    def count(self, batch: Batch) -> Totals:
        """Answers, and tokens of those that are learned from."""
        return {"answers": float(len(batch.lengths)), "tokens": float(batch.weight_T.sum())}

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """See the class."""
        config, logprob_T = self.settings, scores.logprob_T
        advantage_T = batch.signals_T["advantage"].to(logprob_T.dtype)
        # on its first use an answer's probability is what it was when it was sampled
        old_T = logprob_T.detach() if config.num_iterations == 1 else batch.signals_T["logprob"].to(logprob_T.dtype)
        ratio_T = self._ratio(logprob_T - old_T, batch)
        high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        clipped_T = ratio_T.clamp(1 - config.epsilon, 1 + high)
        bounded_T = ratio_T if config.delta is None else ratio_T.clamp(max=config.delta)
        loss_T = -torch.minimum(bounded_T * advantage_T, clipped_T * advantage_T)
        tokens = max(totals["tokens"], 1.0)
        weight_T = batch.weight_T.to(logprob_T.dtype)
        metrics: Metrics = {}
        if config.beta:
            kl_T = per_token_kl(logprob_T, reference_of(scores, logprob_T))
            loss_T = loss_T + config.beta * kl_T
            metrics["kl"] = (weight_T * kl_T.detach()).sum() / tokens
        low_T = (bounded_T < 1 - config.epsilon) & (advantage_T < 0)
        high_T = (bounded_T > 1 + high) & (advantage_T > 0)
        for name, where_T in (("low", low_T), ("high", high_T), ("region", low_T | high_T)):
            metrics[f"clip_ratio/{name}_mean"] = (weight_T * where_T).sum() / tokens
        return self._mean(loss_T, batch, totals), metrics

    def _ratio(self, log_ratio_T: torch.Tensor, batch: Batch) -> torch.Tensor:
        if self.settings.importance_sampling_level == "token":
            return log_ratio_T.exp()
        mean_S = per_segment(log_ratio_T, batch) / tokens_per_segment(batch, log_ratio_T.dtype)
        return mean_S.exp().repeat_interleave(batch.start_S1.diff(), dim=0, output_size=batch.num_tokens)

    def _mean(self, loss_T: torch.Tensor, batch: Batch, totals: Totals) -> torch.Tensor:
        """This batch's share of the mean that `loss_type` names."""
        loss_S, answers = per_segment(loss_T, batch), max(totals["answers"], 1.0)
        if self.settings.loss_type == "grpo":
            return (loss_S / tokens_per_segment(batch, loss_S.dtype)).sum() / answers
        if self.settings.loss_type == "dr_grpo":
            return loss_S.sum() / (answers * self.settings.max_completion_length)
        return loss_S.sum() / max(totals["tokens"], 1.0)

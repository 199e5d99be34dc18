"""Supervised fine-tuning: the mean negative log-probability of the tokens that carry weight, and losses beside it."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from lowrank.batches import Batch, Scores, Totals
from lowrank.objectives import Metrics, Need, Objective, ObjectiveSettings
from lowrank.records import Conversation

_LIKELIEST = 20
"""EAFT takes the entropy of so many likeliest tokens, and divides it by about its largest value."""
_LARGEST_ENTROPY = 3.0


class SFTConfig(ObjectiveSettings):
    """Supervised fine-tuning on conversations: learn the assistant's turns."""

    when = "the default: answers to learn from"
    type: Literal["sft"] = "sft"
    loss_type: Literal["nll", "dft", "asft", "eaft"] = "nll"
    """nll: cross-entropy. dft: each token weighed by its own probability, so that what the model finds unlikely pulls
    less (arXiv:2508.05629). asft: dft, held to the base by a KL divergence (arXiv:2509.23753). eaft: each token
    weighed by how undecided the model is (arXiv:2601.02151)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that goes to all tokens alike, as transformers' `label_smoothing_factor`; only with nll."""
    asft_alpha: float = Field(default=0.1, ge=0)
    """Weight of asft's KL divergence from the base."""
    eaft_alpha: float = Field(default=1.0, ge=0)
    """Exponent of eaft's weights."""

    @model_validator(mode="after")
    def _one_loss(self) -> SFTConfig:
        if self.label_smoothing and self.loss_type != "nll":
            raise ValueError(f"label_smoothing goes with loss_type: nll, not {self.loss_type}; set only one")
        return self

    def build(self) -> Objective:
        """Cross-entropy over the answers (`TokenLoss`, `SmoothedLoss`), or what `loss_type` names."""
        if self.loss_type == "nll":
            return SmoothedLoss(Conversation, self.label_smoothing) if self.label_smoothing else TokenLoss(Conversation)
        return {"dft": DFT, "asft": ASFT, "eaft": EAFT}[self.loss_type](self)


class TokenLoss:
    """loss = - sum_t weight_t log p_t / sum_t weight_t, over the whole optimizer step."""

    def __init__(self, record: type) -> None:
        self.record = record

    def count(self, batch: Batch) -> Totals:
        """Weighted tokens."""
        return {"tokens": float(batch.weight_T.sum())}

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """See the class. A step without a single weighted token has loss 0 and gradient 0, not NaN."""
        return -(batch.weight_T * scores.logprob_T).sum() / max(totals["tokens"], 1e-9), {}


class DFT(TokenLoss):
    """loss = - sum_t weight_t sg(p_t) log p_t / sum_t weight_t; sg: without gradient."""

    def __init__(self, config: SFTConfig) -> None:
        super().__init__(Conversation)
        self.config = config

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """See the class."""
        weighed_T = scores.logprob_T.detach().exp() * scores.logprob_T
        return -(batch.weight_T * weighed_T).sum() / max(totals["tokens"], 1e-9), {}


class ScoredLoss(TokenLoss):
    """loss = - sum_t weight_t score_t / sum_t weight_t, of scores that need the whole distribution of each token."""

    needs: tuple[Need, ...] = ("token_scores",)

    def score(self, logits_KV: torch.Tensor, target_K: torch.Tensor, reference_KV: torch.Tensor | None) -> torch.Tensor:
        """(K, V), (K) -> (K); see objectives.ScoresTokens."""
        raise NotImplementedError

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """See the class."""
        assert scores.score_T is not None, "the objective scores tokens, and they were not"
        return -(batch.weight_T * scores.score_T).sum() / max(totals["tokens"], 1e-9), {}


class SmoothedLoss(ScoredLoss):
    """Cross-entropy with the share `label_smoothing` of each target spread over the vocabulary."""

    def __init__(self, record: type, label_smoothing: float) -> None:
        super().__init__(record)
        self.label_smoothing = label_smoothing

    def score(self, logits_KV: torch.Tensor, target_K: torch.Tensor, reference_KV: torch.Tensor | None) -> torch.Tensor:
        """(1 - e) log p(target) + e (mean over the vocabulary of log p)."""
        logprob_KV = torch.log_softmax(logits_KV, dim=-1)
        right_K = logprob_KV.gather(1, target_K[:, None])[:, 0]
        return (1 - self.label_smoothing) * right_K + self.label_smoothing * logprob_KV.mean(-1)


class ASFT(ScoredLoss):
    """DFT plus `asft_alpha` times the KL divergence of the model from the bare base, sum_v q_v (log q_v - log p_v)."""

    needs = ("token_scores", "reference_logits")

    def __init__(self, config: SFTConfig) -> None:
        super().__init__(Conversation)
        self.alpha = config.asft_alpha

    def score(self, logits_KV: torch.Tensor, target_K: torch.Tensor, reference_KV: torch.Tensor | None) -> torch.Tensor:
        """sg(p) log p - alpha KL."""
        assert reference_KV is not None, "the objective compares with the base"
        logprob_KV = torch.log_softmax(logits_KV, dim=-1)
        right_K = logprob_KV.gather(1, target_K[:, None])[:, 0]
        base_KV = torch.log_softmax(reference_KV, dim=-1)
        divergence_K = (base_KV.exp() * (base_KV - logprob_KV)).sum(-1)
        return right_K.detach().exp() * right_K - self.alpha * divergence_K


class EAFT(ScoredLoss):
    """Each token weighed by sg(entropy of the 20 likeliest tokens / 3)^eaft_alpha."""

    def __init__(self, config: SFTConfig) -> None:
        super().__init__(Conversation)
        self.alpha = config.eaft_alpha

    def score(self, logits_KV: torch.Tensor, target_K: torch.Tensor, reference_KV: torch.Tensor | None) -> torch.Tensor:
        """weight log p."""
        right_K = torch.log_softmax(logits_KV, dim=-1).gather(1, target_K[:, None])[:, 0]
        top_KN = logits_KV.detach().topk(min(_LIKELIEST, logits_KV.shape[-1]), dim=-1).values
        entropy_K = torch.distributions.Categorical(logits=top_KN).entropy()
        return (entropy_K / _LARGEST_ENTROPY) ** self.alpha * right_K

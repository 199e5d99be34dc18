"""Rollouts: prompts of the job's dataloader are answered and rewarded, and the answers become segments.

    prompts --submit--> generator, for all jobs at once --> answers --rewards, targets--> segments with signals

The engine trains on these like on any others. Sampling is a function of (seed, number of the batch, index in it, the
weights), so the state of this dataloader is that of its prompts; between several steps on the same answers, these are
part of the state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lowrank.batches import BASE_SLOT
from lowrank.errors import DataError
from lowrank.generate.request import Answer, GenerationConfig, Prompt
from lowrank.kernels.counter_random import key_of
from lowrank.objectives import needs
from lowrank.objectives.rollout import (
    RolloutBatch,
    RolloutObjective,
    RolloutTargets,
    call_reward_function,
    reward_metrics,
    short_names,
)
from lowrank.ranks import agree
from lowrank.records import Conversation, Prompted
from lowrank.segments import Segment, number_the_step
from lowrank.train.engine import Engine
from lowrank.train.job import StepSource
from lowrank.train.rollout_generator import RolloutGenerator, RolloutRequest
from lowrank.train.trained_job import ForwardResult


@dataclass(frozen=True)
class Prompts:
    """The prompts of a job. `held_out`: answered at evaluations; `longest`: tokens of the longest prompt."""

    train: StepSource
    held_out: Sequence[Segment]
    longest: int
    stop_tokens: frozenset[int]


@dataclass(frozen=True)
class RewardModel:
    """A trained adapter in a slot of its own, and its value head."""

    slot: int
    value_D: torch.Tensor


class Rollouts:
    """A dataloader whose segments are answers of the job's own slot; see the module.

    The loop calls `submit` for all jobs, then `answer`, then `next_step`, so that all are answered in the same passes.
    """

    def __init__(
        self,
        engine: Engine,
        slot: int,
        prompts: Prompts,
        answering: RolloutGenerator,
        seed: int,
        reward_model: RewardModel | None = None,
    ) -> None:
        """DataError for prompts that the model cannot read whole."""
        objective: Any = engine.jobs[slot].objective
        self._objective: RolloutObjective = objective
        self._engine, self._slot, self._prompts, self._answering, self._seed = engine, slot, prompts, answering, seed
        self._reward_model = reward_model
        settings = self._objective.settings
        reach = engine.bank.max_positions(slot)
        if reach is not None and prompts.longest >= reach:
            raise DataError(
                f"a prompt has {prompts.longest} tokens and the model's maximum context length is {reach}; set "
                f"data.max_length below {reach}"
            )
        tokens = engine.bank.num_virtual(slot) + prompts.longest + settings.max_completion_length
        answering.reserve(tokens, compile=settings.compile)
        self._config = GenerationConfig(
            max_new_tokens=settings.max_completion_length,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
        )
        self._batch = 0
        """Batches of answers sampled so far."""
        self._used = 0
        """Steps taken on the current batch of answers."""
        self._segments: list[Segment] = []
        self._submitted: list[tuple[Segment, RolloutRequest]] = []
        self._fresh = False
        """Whether the current answers have not been used for a step yet."""
        self._before: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        """Metrics of the answers of the last step."""

    @property
    def epoch(self) -> float:
        """See StepSource: that of the prompts."""
        return self._prompts.train.epoch

    @property
    def reward_slot(self) -> int | None:
        """See RolloutSource."""
        return None if self._reward_model is None else self._reward_model.slot

    def submit(self) -> None:
        """See RolloutSource."""
        if self._used or self._submitted or self._fresh:
            return
        self._before = self.state()
        prompts = [segment for segment in self._prompts.train.next_step() for _ in range(self._objective.group)]
        for index, segment in enumerate(prompts):
            seed = key_of(self._seed, "answers", self._batch, index)
            self._submitted.append((segment, self._submit(segment, self._config.model_copy(update={"seed": seed}))))

    def answer(self) -> None:
        """See RolloutSource."""
        if self._submitted:
            self._answering.finish()
            self._segments = self._with_targets(self._submitted)
            self._submitted, self._fresh = [], True

    def next_step(self) -> list[Segment]:
        """See StepSource."""
        self.submit()
        self.answer()
        if self._fresh:
            self._batch, self._fresh = self._batch + 1, False
        self._used = (self._used + 1) % self._objective.steps_per_batch
        return self._segments

    def evaluate(self) -> ForwardResult:
        """See RolloutSource."""
        likeliest = self._config.model_copy(update={"temperature": 0.0})
        requests = [(segment, self._submit(segment, likeliest)) for segment in self._prompts.held_out]
        self._answering.finish()
        rollouts, metrics = self._rewarded(requests)
        return ForwardResult(
            -metrics["reward"],
            int(sum(map(len, self._prompts.held_out)) + rollouts.length_N.sum()),
            {"tokens": float(rollouts.length_N.sum())},
            metrics,
        )

    def state(self) -> dict[str, Any]:
        """See StepSource. Answers on which no step was taken are not part of it: their prompts are submitted again."""
        if self._submitted or self._fresh:
            return self._before
        kept = [_as_json(segment) for segment in self._segments] if self._used else []
        return {
            "prompts": self._prompts.train.state(),
            "batch": self._batch,
            "used": self._used,
            "answers": kept,
            "metrics": self.metrics,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """See StepSource."""
        self._prompts.train.load_state(state["prompts"])
        self._batch, self._used, self._submitted, self._fresh = state["batch"], state["used"], [], False
        self.metrics = dict(state["metrics"])
        self._segments = number_the_step([_from_json(each) for each in state["answers"]])

    def _submit(self, segment: Segment, config: GenerationConfig) -> RolloutRequest:
        prompt = Prompt(segment.token_L.astype(np.int64), self._slot)
        return self._answering.submit(prompt, config, self._prompts.stop_tokens)

    def _with_targets(self, requests: Sequence[tuple[Segment, RolloutRequest]]) -> list[Segment]:
        rollouts, metrics = self._rewarded(requests)
        answers = [each.answer for _, each in requests]
        segments = [_with_answer(segment, answer) for (segment, _), answer in zip(requests, answers)]
        rollouts.answer = [segment.weight_L != 0 for segment in segments]
        if needs(self._objective, "token_values"):  # the value of a token is at its predictor, one position before
            rollouts.value = [np.append(np.float32(0), each[:-1]) for each in self._engine.values(self._slot, segments)]
        if self._objective.steps_per_batch > 1 or needs(self._objective, "token_values"):
            rollouts.logprob = self._engine.logprobs(self._slot, segments)
        if self._objective.needs_reference:
            rollouts.reference = self._engine.logprobs(BASE_SLOT, segments)
        targets = self._objective.compute_targets(rollouts)
        self.metrics = metrics | targets.metrics
        failed_N = np.array([answer.finish == "error" for answer in answers])
        return number_the_step(_attached(segments, rollouts, targets, failed_N))

    def _rewarded(self, requests: Sequence[tuple[Segment, RolloutRequest]]) -> tuple[RolloutBatch, dict[str, float]]:
        answers = [each.answer for _, each in requests]
        settings = self._objective.settings
        arguments = self._arguments([segment for segment, _ in requests], answers)
        rewards = agree(  # by one rank: a reward function may cost money, or be random
            self._engine.lanes.ranks,
            lambda: [call_reward_function(name, len(requests), arguments).tolist() for name in settings.reward_funcs],
        )
        columns = [np.array(each, np.float64) for each in rewards]
        names, weights = short_names(settings.reward_funcs), list(settings.reward_weights or [1.0] * len(columns))
        if self._reward_model is not None:
            segments = [_with_answer(segment, answer) for (segment, _), answer in zip(requests, answers)]
            values = self._engine.values(self._reward_model.slot, segments, self._reward_model.value_D)
            columns.append(np.array([value_L[-1] for value_L in values], np.float64))
            names, weights = [*names, "reward_model"], [*weights, 1.0]
        rollouts = RolloutBatch(
            np.stack(columns, axis=1),
            np.array(weights),
            np.array([answer.finish == "length" for answer in answers]),
            np.array([len(answer.tokens) + (answer.stop_token is not None) for answer in answers]),
        )
        return rollouts, reward_metrics(rollouts, names)

    def _arguments(self, segments: Sequence[Segment], answers: Sequence[Answer]) -> dict[str, list[Any]]:
        """Return the arguments of reward functions, as TRL calls them for conversations."""
        prompts = [_as_generated(segment) for segment in segments]
        tokenizer = self._engine.base.tokenizer
        texts = [tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in answers]
        names = {name: None for each in prompts for name in each.columns}
        columns: dict[str, list[Any]] = {name: [each.columns.get(name) for each in prompts] for name in names}
        return {
            "label": [each.label for each in prompts],
            **columns,
            "prompts": [_messages(each.prompt) for each in prompts],
            "completions": [[{"role": "assistant", "content": text}] for text in texts],
            "completion_ids": [list(answer.tokens) for answer in answers],
        }


def steps_on_one_batch(objective: Any) -> int:
    """Return the number of optimizer steps on one step of a dataloader: more than one only for rollout objectives that
    use answers again."""
    return objective.steps_per_batch if needs(objective, "rollouts") else 1


def worst_case_step(objective: Any, prompts: Sequence[Segment]) -> list[Segment]:
    """Return the heaviest step that answers to `prompts` can make, each of maximum length. For planning memory."""
    rollout_objective: RolloutObjective = objective
    longest = rollout_objective.settings.max_completion_length
    segments = []
    for prompt in prompts:
        token_L = np.concatenate([prompt.token_L, np.zeros(longest, prompt.token_L.dtype)])
        weight_L = np.concatenate([np.zeros(len(prompt)), np.ones(longest)]).astype(np.float32)
        segments += [Segment(token_L, weight_L)] * rollout_objective.group
    rollouts = RolloutBatch(
        np.zeros((len(segments), 1)), np.ones(1), np.zeros(len(segments), bool), np.full(len(segments), longest)
    )
    known = [np.zeros(len(segment), np.float32) for segment in segments]
    rollouts.answer = [segment.weight_L != 0 for segment in segments]
    rollouts.value = known
    rollouts.logprob = known
    rollouts.reference = known if rollout_objective.needs_reference else None
    targets = rollout_objective.compute_targets(rollouts)
    return number_the_step(_attached(segments, rollouts, targets, np.zeros(len(segments), bool)))


def _as_generated(segment: Segment) -> Prompted:
    assert segment.prompted is not None, "segments of the prompts' dataloader have their prompt"
    return segment.prompted


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def _with_answer(prompt: Segment, answer: Answer) -> Segment:
    """Return prompt and answer as one segment, with the end of turn if the model sampled it. The answer's tokens carry
    weight."""
    answer_tokens = [*answer.tokens, *([] if answer.stop_token is None else [answer.stop_token])]
    token_L = np.concatenate([prompt.token_L, np.asarray(answer_tokens, prompt.token_L.dtype)])
    weight_L = np.concatenate([np.zeros(len(prompt)), np.ones(len(answer_tokens))]).astype(np.float32)
    return Segment(token_L, weight_L)


def _attached(
    segments: Sequence[Segment], rollouts: RolloutBatch, targets: RolloutTargets, failed_N: np.ndarray
) -> list[Segment]:
    """Return the segments with the targets as signals. Where generation gave NaN, so are the signals, and the step is
    skipped."""
    attached = []
    for index, segment in enumerate(segments):
        signals = {
            name: np.broadcast_to(np.float32(np.nan) if failed_N[index] else value, len(segment)).astype(np.float32)
            for name, value in targets.signals[index].items()
        }
        weight_L = segment.weight_L if targets.learned_N[index] else np.zeros_like(segment.weight_L)
        reference_L = None if rollouts.reference is None else rollouts.reference[index]
        attached.append(replace(segment, weight_L=weight_L, reference_L=reference_L, signals_L=signals))
    return attached


def _as_json(segment: Segment) -> dict[str, Any]:
    return {
        "tokens": segment.token_L.tolist(),
        "weights": segment.weight_L.tolist(),
        "reference": None if segment.reference_L is None else segment.reference_L.tolist(),
        "signals": {name: value_L.tolist() for name, value_L in segment.signals_L.items()},
    }


def _from_json(kept: Mapping[str, Any]) -> Segment:
    reference = kept["reference"]
    return Segment(
        np.asarray(kept["tokens"], np.int32),
        np.asarray(kept["weights"], np.float32),
        reference_L=None if reference is None else np.asarray(reference, np.float32),
        signals_L={name: np.asarray(value, np.float32) for name, value in kept["signals"].items()},
    )

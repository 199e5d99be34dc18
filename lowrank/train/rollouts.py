"""Rollouts: prompts are drawn from the job's dataloader, answered, rewarded, and become segments.

    prompts --ask--> generator, for all jobs at once --> answers --judge--> segments with what was found out about them

The engine trains on these like on any others. What is drawn is a function of (seed, number of the batch, place in it,
the weights), so a dataloader's state is where its prompts stand; in the middle of several steps on the same answers
these are part of it.
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
from lowrank.train.trained_job import Forwarded


@dataclass(frozen=True)
class Prompts:
    """Where a job's questions come from. `held_out` are asked at evaluations; `longest` is the most tokens of one."""

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

    `ask` is called for all jobs before the first `next_step`, so that they are answered together.
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
        """Batches of answers drawn so far."""
        self._used = 0
        """Steps taken on the present one."""
        self._segments: list[Segment] = []
        self._submitted: list[tuple[Segment, RolloutRequest]] = []
        self._fresh = False
        """The answers are there and no step was taken on them."""
        self._before: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        """Of the answers of the last step."""

    @property
    def epoch(self) -> float:
        """The prompts' own."""
        return self._prompts.train.epoch

    @property
    def reward_slot(self) -> int | None:
        """The slot of the reward model, which nobody else uses."""
        return None if self._reward_model is None else self._reward_model.slot

    def submit(self) -> None:
        """Put the questions of the next step, if it has new ones."""
        if self._used or self._submitted or self._fresh:
            return
        self._before = self.state()
        prompts = [segment for segment in self._prompts.train.next_step() for _ in range(self._objective.group)]
        for place, segment in enumerate(prompts):
            seed = key_of(self._seed, "answers", self._batch, place)
            self._submitted.append((segment, self._submit(segment, self._config.model_copy(update={"seed": seed}))))

    def answer(self) -> None:
        """Have what was asked answered and judged. ConfigError if a reward function fails; nothing is lost then."""
        if self._submitted:
            self._answering.finish()
            self._segments = self._judged(self._submitted)
            self._submitted, self._fresh = [], True

    def next_step(self) -> list[Segment]:
        """The segments of the next optimizer step, numbered."""
        self.submit()
        self.answer()
        if self._fresh:
            self._batch, self._fresh = self._batch + 1, False
        self._used = (self._used + 1) % self._objective.steps_per_batch
        return self._segments

    def evaluate(self) -> Forwarded:
        """The likeliest answer to each held-out prompt, judged. The loss is minus the mean reward."""
        likeliest = self._config.model_copy(update={"temperature": 0.0})
        requests = [(segment, self._submit(segment, likeliest)) for segment in self._prompts.held_out]
        self._answering.finish()
        drawn, metrics = self._rewarded(requests)
        return Forwarded(
            -metrics["reward"],
            int(sum(map(len, self._prompts.held_out)) + drawn.length_N.sum()),
            {"tokens": float(drawn.length_N.sum())},
            metrics,
        )

    def state(self) -> dict[str, Any]:
        """Plain JSON for `load_state`. Of questions no step was taken on, nothing: they are asked again."""
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
        """Go on where `state` was taken."""
        self._prompts.train.load_state(state["prompts"])
        self._batch, self._used, self._submitted, self._fresh = state["batch"], state["used"], [], False
        self.metrics = dict(state["metrics"])
        self._segments = number_the_step([_from_json(each) for each in state["answers"]])

    def _submit(self, segment: Segment, config: GenerationConfig) -> RolloutRequest:
        prompt = Prompt(segment.token_L.astype(np.int64), self._slot)
        return self._answering.submit(prompt, config, self._prompts.stop_tokens)

    def _judged(self, requests: Sequence[tuple[Segment, RolloutRequest]]) -> list[Segment]:
        drawn, metrics = self._rewarded(requests)
        answers = [each.answer for _, each in requests]
        segments = [_with_answer(segment, answer) for (segment, _), answer in zip(requests, answers)]
        drawn.answer = [segment.weight_L != 0 for segment in segments]
        if needs(self._objective, "token_values"):  # a token's is the one where it is predicted: one place before
            drawn.value = [np.append(np.float32(0), each[:-1]) for each in self._engine.values(self._slot, segments)]
        if self._objective.steps_per_batch > 1 or needs(self._objective, "token_values"):
            drawn.logprob = self._engine.logprobs(self._slot, segments)
        if self._objective.compares:
            drawn.reference = self._engine.logprobs(BASE_SLOT, segments)
        judged = self._objective.judge(drawn)
        self.metrics = metrics | judged.metrics
        failed_N = np.array([answer.finish == "error" for answer in answers])
        return number_the_step(_attached(segments, drawn, judged, failed_N))

    def _rewarded(self, requests: Sequence[tuple[Segment, RolloutRequest]]) -> tuple[RolloutBatch, dict[str, float]]:
        answers = [each.answer for _, each in requests]
        settings = self._objective.settings
        arguments = self._arguments([segment for segment, _ in requests], answers)
        judged = agree(  # by one rank: a judge may be a program that costs money, or that judges otherwise each time
            self._engine.lanes.ranks,
            lambda: [call_reward_function(name, len(requests), arguments).tolist() for name in settings.reward_funcs],
        )
        given = [np.array(each, np.float64) for each in judged]
        names, weights = short_names(settings.reward_funcs), list(settings.reward_weights or [1.0] * len(given))
        if self._reward_model is not None:
            segments = [_with_answer(segment, answer) for (segment, _), answer in zip(requests, answers)]
            values = self._engine.values(self._reward_model.slot, segments, self._reward_model.value_D)
            given.append(np.array([value_L[-1] for value_L in values], np.float64))
            names, weights = [*names, "reward_model"], [*weights, 1.0]
        drawn = RolloutBatch(
            np.stack(given, axis=1),
            np.array(weights),
            np.array([answer.finish == "length" for answer in answers]),
            np.array([len(answer.tokens) + (answer.stop_token is not None) for answer in answers]),
        )
        return drawn, reward_metrics(drawn, names)

    def _arguments(self, segments: Sequence[Segment], answers: Sequence[Answer]) -> dict[str, list[Any]]:
        """What reward functions are called with, as TRL calls them for conversations."""
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
    """Optimizer steps on what a dataloader gives at once: more than one only where an objective uses answers again."""
    return objective.steps_per_batch if needs(objective, "rollouts") else 1


def worst_case_step(objective: Any, prompts: Sequence[Segment]) -> list[Segment]:
    """The heaviest step that answers to `prompts` can make: each as long as it may be. For planning memory."""
    drawing: RolloutObjective = objective
    longest = drawing.settings.max_completion_length
    segments = []
    for prompt in prompts:
        token_L = np.concatenate([prompt.token_L, np.zeros(longest, prompt.token_L.dtype)])
        weight_L = np.concatenate([np.zeros(len(prompt)), np.ones(longest)]).astype(np.float32)
        segments += [Segment(token_L, weight_L)] * drawing.group
    drawn = RolloutBatch(
        np.zeros((len(segments), 1)), np.ones(1), np.zeros(len(segments), bool), np.full(len(segments), longest)
    )
    known = [np.zeros(len(segment), np.float32) for segment in segments]
    drawn.answer = [segment.weight_L != 0 for segment in segments]
    drawn.value = known
    drawn.logprob = known
    drawn.reference = known if drawing.compares else None
    judged = drawing.judge(drawn)
    return number_the_step(_attached(segments, drawn, judged, np.zeros(len(segments), bool)))


def _as_generated(segment: Segment) -> Prompted:
    assert segment.prompted is not None, "a segment of the prompts' dataloader that asks nothing"
    return segment.prompted


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def _with_answer(prompt: Segment, answer: Answer) -> Segment:
    """Prompt and answer, the end of turn included if the model drew it: the answer's tokens carry weight."""
    described = [*answer.tokens, *([] if answer.stop_token is None else [answer.stop_token])]
    token_L = np.concatenate([prompt.token_L, np.asarray(described, prompt.token_L.dtype)])
    weight_L = np.concatenate([np.zeros(len(prompt)), np.ones(len(described))]).astype(np.float32)
    return Segment(token_L, weight_L)


def _attached(
    segments: Sequence[Segment], drawn: RolloutBatch, judged: RolloutTargets, failed_N: np.ndarray
) -> list[Segment]:
    """The segments with what was found out. An adapter that gave NaN gets NaN back, so that its step is skipped."""
    attached = []
    for place, segment in enumerate(segments):
        signals = {
            name: np.broadcast_to(np.float32(np.nan) if failed_N[place] else value, len(segment)).astype(np.float32)
            for name, value in judged.signals[place].items()
        }
        weight_L = segment.weight_L if judged.learned_N[place] else np.zeros_like(segment.weight_L)
        reference_L = None if drawn.reference is None else drawn.reference[place]
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

"""vLLM's words for how answers are drawn, over transformers' generation: what `fast_inference` notebooks speak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank.errors import ConfigError, raise_all


@dataclass
class SamplingParams:
    """vLLM's class of that name, as far as it is honored here; vLLM's own is taken as well."""

    n: int = 1
    temperature: float = 1.0
    """0: the most likely token, always."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


_UNHEARD = ("presence_penalty", "frequency_penalty", "logprobs", "prompt_logprobs", "bad_words", "logit_bias",
            "guided_decoding", "structured_outputs", "allowed_token_ids")  # fmt: skip
"""What vLLM has and transformers' generation has not; refused where it asks for something."""


@dataclass
class CompletionOutput:
    """One answer, in vLLM's shape."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    """`stop` or `length`."""


@dataclass
class RequestOutput:
    """A prompt and its answers, in vLLM's shape."""

    request_id: str
    prompt: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True


@dataclass(frozen=True)
class LoRARequest:
    """An adapter that `load_lora` has read: `lora_name` is its name in the model."""

    lora_name: str
    lora_path: str
    lora_int_id: int = 1


def check(params: Any) -> None:
    """ConfigError lists all that is asked and not honored."""
    problems = [f"{name}={getattr(params, name)!r}" for name in _UNHEARD if getattr(params, name, None)]
    raise_all(ConfigError, "sampling_params: transformers' generation has no such thing; leave it out", problems)


def sampling_fields(params: Any) -> dict[str, Any]:
    """GRPOConfig's fields for `vllm_sampling_params`; those that ask for nothing are left to the settings beside it."""
    check(params)
    found: dict[str, Any] = {}
    if params.temperature != 1.0:
        found["temperature"] = params.temperature
    if params.top_p != 1.0:
        found["top_p"] = params.top_p
    if params.top_k > 0:
        found["top_k"] = params.top_k
    if params.min_p:
        found["min_p"] = params.min_p
    if params.repetition_penalty != 1.0:
        found["repetition_penalty"] = params.repetition_penalty
    return found


def generation_arguments(params: Any, tokenizer: Any) -> dict[str, Any]:
    """Arguments of transformers' `generate` for vLLM's."""
    check(params)
    wanted: dict[str, Any] = {"num_return_sequences": params.n, "do_sample": params.temperature > 0}
    if params.temperature > 0:
        wanted |= {"temperature": params.temperature, "top_p": params.top_p, "top_k": max(params.top_k, 0)}
        wanted |= {"min_p": params.min_p} if params.min_p else {}
    if params.repetition_penalty != 1.0:
        wanted["repetition_penalty"] = params.repetition_penalty
    if params.max_tokens is not None:
        wanted["max_new_tokens"] = params.max_tokens
    if params.min_tokens:
        wanted["min_new_tokens"] = params.min_tokens
    stops = stop_strings(params, tokenizer)
    if stops:
        wanted |= {"stop_strings": stops, "tokenizer": tokenizer}
    ends = [*(params.stop_token_ids or ()), *([] if params.ignore_eos else [tokenizer.eos_token_id])]
    wanted["eos_token_id"] = [each for each in ends if each is not None] or None
    return wanted


def stop_strings(params: Any, tokenizer: Any) -> list[str]:
    """Texts that end an answer, without EOS, which ends it as a token."""
    given = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
    return [text for text in given if text != tokenizer.eos_token]


def answers(model: Any, prompts: str | Sequence[str], params: Any, tokenizer: Any) -> list[RequestOutput]:
    """The answers of a model (transformers' generate) to texts, in vLLM's shape and the order of the prompts."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    params = params if params is not None else SamplingParams()
    if params.seed is not None:
        torch.manual_seed(params.seed)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    width = rows["input_ids"].shape[1]
    wanted = generation_arguments(params, tokenizer)
    token_BL = model.generate(**rows, **wanted, pad_token_id=tokenizer.pad_token_id)
    stops = stop_strings(params, tokenizer)
    ends: set[int] = set(wanted["eos_token_id"] or ())
    found = []
    for index, text in enumerate(texts):
        prompt = rows["input_ids"][index][rows["attention_mask"][index].bool()].tolist()
        own = token_BL[index * params.n : (index + 1) * params.n, width:].tolist()
        outputs = [_output(place, each, params, tokenizer, stops, ends) for place, each in enumerate(own)]
        found.append(RequestOutput(str(index), text, prompt, outputs))
    return found


def fast_generate(model: Any, prompts: str | Sequence[str], params: Any, lora_request: Any) -> list[RequestOutput]:
    """`answers` of a `TunedModel` with the adapter of a `LoRARequest`, or (None) of its bare base; the adapter that was
    at work is at work again afterwards."""
    before, tokenizer = getattr(model, "active_adapter", ""), model.base.tokenizer
    if lora_request is None:
        with model.disable_adapter():
            return answers(model, prompts, params, tokenizer)
    model.set_adapter(lora_request.lora_name)
    try:
        return answers(model, prompts, params, tokenizer)
    finally:
        if before:
            model.set_adapter(before)


def load_lora(model: Any, folder: str | Path) -> LoRARequest:
    """Read an adapter's folder into a `TunedModel`, whose adapter at work stays at work."""
    name = f"lora_request {Path(folder).resolve()}".replace(".", "_")
    if name in model.slots:
        model.delete_adapter(name)
    before = getattr(model, "active_adapter", "")
    model.load_adapter(folder, name)
    if before:
        model.set_adapter(before)
    return LoRARequest(name, str(folder))


def _output(
    index: int, tokens: list[int], params: Any, tokenizer: Any, stops: list[str], ends: set[int]
) -> CompletionOutput:
    last = next((place for place, token in enumerate(tokens) if token in ends), None)
    tokens = tokens if last is None else tokens[: last + 1]
    text = tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens)
    stopped = last is not None
    for stop in stops:
        place = text.find(stop)
        if place >= 0:
            stopped = True
            text = text[: place + (len(stop) if params.include_stop_str_in_output else 0)]
    if last is not None and params.include_stop_str_in_output and params.skip_special_tokens:
        named = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
        text += tokenizer.eos_token if tokenizer.eos_token in named else ""
    while stopped and last is None and tokens and tokens[-1] == tokenizer.pad_token_id:
        tokens = tokens[:-1]
    return CompletionOutput(index, text, tokens, "stop" if stopped else "length")

"""lm-eval's tasks on a bank: every adapter, and the base, in the same forward passes.

lm-eval (EleutherAI's Language Model Evaluation Harness) asks one model at a time. The first model that is asked asks
for all of them, and the others find their answers there. Contexts, continuations and stop texts are cut and
tokenized as lm-eval does it for a transformers model, so the numbers are those of the merged adapter.

Needs `pip install 'lowrank-llm[eval]'`; nothing else imports this file.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lowrank.data.chat.template_sandbox import render_text
from lowrank.errors import ModelError
from lowrank.evaluate.likelihood import continuation_logprobs
from lowrank.evaluate.predict import AnsweringModels
from lowrank.generate.generator import Generator, GeneratorConfig
from lowrank.generate.request import GenerationConfig, Prompt

_DEFAULT_LENGTH = 2048
"""lm-eval's, where a model does not say how much it reads."""
_MAX_NEW_TOKENS = 256
"""lm-eval's, where a task does not say."""
_MAX_ROWS = 64
_HANDLED = ("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k")

Scored = tuple[float, bool]
_Key = tuple[Any, ...]


@dataclass
class HarnessAnswers:
    """What all models said, found by what was asked.

    broken      models whose numbers are not finite, which have no result
    shortened   contexts that were cut on the left to fit into the model, as lm-eval does
    """

    models: AnsweringModels
    scored: dict[str, dict[_Key, Scored]] = field(default_factory=dict)
    written: dict[str, dict[_Key, str]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    shortened: set[_Key] = field(default_factory=set)
    on_done: Callable[[str, int, int], None] = lambda what, done, total: None

    def score(self, model_name: str, keys: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Scored]:
        """Of each (context, continuation)."""
        missing = [key for key in dict.fromkeys(keys) if key not in self.scored.get(model_name, {})]
        if missing:
            names = self._sound(model_name)
            entries = [(self.models.slots[name], *key) for key in missing for name in names]
            found = continuation_logprobs(
                self.models.base,
                self.models.bank,
                entries,
                on_done=lambda done: self.on_done("log-likelihoods", done, len(entries)),
            )
            for index, scored in enumerate(found):
                key, name = missing[index // len(names)], names[index % len(names)]
                self.scored.setdefault(name, {})[key] = scored
                if not math.isfinite(scored[0]):
                    self.broken.add(name)
        self.refuse_broken(model_name)
        return [self.scored[model_name][key] for key in keys]

    def write(
        self, model_name: str, requests: Mapping[_Key, tuple[np.ndarray, GenerationConfig]], stop: frozenset[int]
    ) -> list[str]:
        """The answer to each prompt."""
        missing = [key for key in requests if key not in self.written.get(model_name, {})]
        if missing:
            self._write(self._sound(model_name), {key: requests[key] for key in missing}, stop)
        self.refuse_broken(model_name)
        return [self.written[model_name][key] for key in requests]

    def _write(
        self, names: Sequence[str], requests: Mapping[_Key, tuple[np.ndarray, GenerationConfig]], stop: frozenset[int]
    ) -> None:
        longest = max(len(token_L) + config.max_new_tokens for token_L, config in requests.values())
        rows = min(_MAX_ROWS, len(requests) * len(names))
        settings = GeneratorConfig(max_num_seqs=rows, kv_cache_tokens=(rows + 1) * (longest + 256))
        generator = Generator(self.models.base, self.models.bank, settings, self.models.compiled)
        running = {
            (key, name): generator.submit(Prompt(token_L, self.models.slots[name]), config, stop_tokens=stop)
            for key, (token_L, config) in requests.items()
            for name in names
        }
        while generator.step():
            left = generator.num_running + generator.num_waiting
            self.on_done("answers", len(running) - left, len(running))
        for (key, name), generation in running.items():
            answer = generation.answer
            text = self.models.base.tokenizer.decode(answer.tokens, skip_special_tokens=True)
            self.written.setdefault(name, {})[key] = text
            if answer.error is not None:
                self.broken.add(name)

    def _sound(self, model_name: str) -> list[str]:
        """Who is asked: all but the broken ones, whose answers nobody needs."""
        self.refuse_broken(model_name)
        return [name for name in self.models.slots if name not in self.broken]

    def refuse_broken(self, model_name: str) -> None:
        """ModelError if what this model says is not finite."""
        if model_name in self.broken:
            raise ModelError(f"{model_name}: its probabilities are not finite, so it has no result; it has diverged")


class BankLM(TemplateLM):
    """One model, as lm-eval sees a model."""

    def __init__(self, answers: HarnessAnswers, model_name: str) -> None:
        super().__init__()
        self.answers = answers
        self.model_name = model_name
        self.renderer = answers.models.renderers[model_name]
        self.base = answers.models.base
        self.tokenizer = self.base.tokenizer
        self.max_length = answers.models.bank.max_positions(answers.models.slots[model_name]) or _DEFAULT_LENGTH
        own: Any = getattr(self.base.model, "generation_config", None)
        ends = getattr(own, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self._stop = frozenset(end for end in (*ends, self.tokenizer.eos_token_id) if end is not None)
        self._penalty = float(getattr(own, "repetition_penalty", None) or 1.0)

    @property
    def eot_token_id(self) -> int:
        """Ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Tells lm-eval's caches apart."""
        return str(self.base.name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """With the tokenizer's own special tokens, unless the text begins with BOS already."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja source that the model was trained with."""
        return self.renderer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. ModelError for what the chat template cannot write, or costs too much."""
        try:
            return render_text(
                self.tokenizer,
                chat_history,
                template=self.renderer.chat_template,
                generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                variables=self.renderer.config.chat_template_kwargs,
            )
        except (TemplateError, TypeError, LookupError, AttributeError) as error:
            raise ModelError(
                f"{self.model_name}: the chat template cannot write a question of the task: {error}"
            ) from error

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's results file."""
        return {
            "model": "lowrank",
            "model_args": {"base": str(self.base.name), "adapter": self.model_name},
            "model_num_parameters": sum(each.numel() for each in self.base.model.parameters()),
            "model_dtype": str(self.base.dtype),
        }

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        keys = []
        for _text, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise ModelError(
                    f"an answer of {len(continuation)} tokens, and the model's maximum context length is "
                    f"{self.max_length}"
                )
            keys.append((tuple(context[-room:]), tuple(continuation)))
            if len(context) > room:
                self.answers.shortened.add(keys[-1][0])
        return self.answers.score(self.model_name, keys)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the model's length."""
        windows, owners = [], []
        for index, (text,) in enumerate(request.args for request in requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pieces):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop text."""
        generations: dict[_Key, tuple[np.ndarray, GenerationConfig]] = {}
        stops: list[list[str]] = []
        seen: Counter[_Key] = Counter()
        for context, arguments in (request.args for request in requests):
            unknown = sorted(arguments.keys() - set(_HANDLED))
            if unknown:
                raise ModelError(f"the task asks for generation options that are not there: {', '.join(unknown)}")
            key: _Key = (context, json.dumps(arguments, sort_keys=True))
            seen[key] += 1
            until = arguments.get("until") or []
            stops.append([until] if isinstance(until, str) else list(until))
            config = self._config(arguments, stops[-1], seed=seen[key])
            generations[(*key, seen[key])] = self._prompt(context, config.max_new_tokens), config
        texts = self.answers.write(self.model_name, generations, self._stop)
        ending = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        return [postprocess_generated_text(text, [*stop, ending], None) for text, stop in zip(texts, stops)]

    def _config(self, arguments: Mapping[str, Any], until: Sequence[str], seed: int) -> GenerationConfig:
        """Greedy unless the task says `do_sample`; of repeated questions each has draws of its own."""
        sampled = bool(arguments.get("do_sample"))
        return GenerationConfig(
            max_new_tokens=arguments.get("max_gen_toks") or arguments.get("max_new_tokens") or _MAX_NEW_TOKENS,
            temperature=arguments.get("temperature", 1.0) if sampled else 0.0,
            top_p=arguments.get("top_p", 1.0) if sampled else 1.0,
            top_k=arguments.get("top_k", 0) if sampled else 0,
            repetition_penalty=self._penalty,
            stop=tuple(stop for stop in until if stop),
            seed=seed,
        )

    def _prompt(self, context: str, max_new_tokens: int) -> np.ndarray:
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ModelError(
                f"the task asks for up to {max_new_tokens} new tokens, and the model's maximum context length is "
                f"{self.max_length} in all"
            )
        tokens = self.tokenizer.encode(context)
        if has_bos_prefix(context, self.tokenizer.bos_token):
            tokens = self.tokenizer.encode(context, add_special_tokens=False)
        if len(tokens) > room:
            self.answers.shortened.add((context,))
        return np.asarray(tokens[-room:], np.int64)

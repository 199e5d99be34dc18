"""`lowrank.load` and `lowrank.generate`: ask a base and its adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Union, cast, overload

from lowrank.api.keywords import known_keywords
from lowrank.compat.llamafactory.commands import answering_file
from lowrank.data.formats.columns import RowProblem
from lowrank.data.formats.media import open_parts
from lowrank.data.formats.turns import conversation, prompt, read_tools, read_turns
from lowrank.errors import ConfigError, DataError, ModelError, raise_all
from lowrank.generate.request import Answer, GenerationConfig
from lowrank.notices import log_notice
from lowrank.pipelines.inference import BASE_NAME, InferenceModel
from lowrank.records import Conversation, Message
from lowrank.serve.chat_backends import ChatBackend, GgufChatBackend, backend_reward_model_notice, open_chat_backend
from lowrank.setting_problems import settings_of
from lowrank.third_party import code_allowed

Question = Union[str, Sequence[Mapping[str, Any]], Conversation]  # noqa: UP007 (read at run time on Python 3.10)
"""A question, or a conversation so far as OpenAI's messages, which ends in one."""


Judged = Union[Sequence[Mapping[str, Any]], Conversation]  # noqa: UP007 (read at run time on Python 3.10)
"""A conversation that ends in an answer, as OpenAI's messages."""


class Model:
    """A base and its adapters, ready to answer: what `lowrank.load` returns. It may be used as a context (`with`).

    adapters   their names; the base alone goes by `base`
    """

    def __init__(
        self, backend: ChatBackend, *, system: str | None = None, sampling: Mapping[str, Any] | None = None
    ) -> None:
        self._backend = backend
        self._system = system
        self._sampling = dict(sampling or {})
        self.adapters: list[str] = [name for name in backend.names if name != BASE_NAME]

    @property
    def inference(self) -> InferenceModel:
        """The loaded base, bank of adapters and renderers. ModelError for a GGUF file, which llama.cpp has loaded."""
        if not isinstance(self._backend, InferenceModel):
            raise ModelError("a GGUF file is run by llama.cpp: there are no weights of it here")
        return self._backend

    @overload
    def generate(self, question: str, adapter: str | None = ..., **sampling: Any) -> str: ...

    @overload
    def generate(
        self, question: Sequence[Any], adapter: str | Sequence[str | None] | None = ..., **sampling: Any
    ) -> Any: ...

    def generate(
        self,
        question: Question | Sequence[Question],
        adapter: str | Sequence[str | None] | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        **sampling: Any,
    ) -> Any:
        """The answer to a question, or a list of answers to a list of them, which share the forward passes.

        question   a text; a conversation so far, as OpenAI's messages (a list of dicts); or a list of either. A content
                   may have parts: `{"type": "text", "text": ...}`, and for a model that sees `{"type": "image",
                   "image": ...}` (a path, bytes, base64, one of Pillow's) or OpenAI's `image_url` with base64
        adapter    who answers: one of `adapters`, or `base`. Left out: the only adapter, or, without any, the base.
                   With a list of questions also a list, one for each; what all answer to one question is `compare`
        on_text    called with each piece of text as it comes (with a single question only)
        tools      functions that may be called, as OpenAI's schemas
        sampling   what `GenerationConfig` has: `max_new_tokens`, `temperature`, `top_p`, `seed`, `json_schema` ...

        Raises ModelError for an unknown adapter, a question too long, or an answer that cannot be had; DataError for
        messages that are no conversation; ConfigError for unknown options, and for other than one adapter for each
        question.
        """
        several = not _is_one(question)
        questions = cast(Sequence[Any], question) if several else [question]
        if not (several or adapter is None or isinstance(adapter, str)):
            raise ConfigError(f"adapter: one name for one question, got {_short(adapter)}; {_EACH}")
        answers = self.answers(questions, adapter, on_text=on_text, tools=tools, **sampling)
        names = self._each_chosen(adapter, len(answers))
        failed = {number: each.error for number, each in enumerate(answers, 1) if each.error}
        who = ", ".join(dict.fromkeys(names[number - 1] for number in failed))
        problems = [f"question {number}: {error}" for number, error in failed.items()]
        raise_all(ModelError, f"{who} gives no answer", problems)
        texts = [each.text for each in answers]
        return texts if several else texts[0]

    def answers(
        self,
        questions: Sequence[Question],
        adapter: str | Sequence[str | None] | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        **sampling: Any,
    ) -> list[Answer]:
        """As `generate`, always of a list, with tokens, why each ended, log-probabilities (`logprobs=0`), and the
        error of one that could not be had."""
        names, config = self._each_chosen(adapter, len(questions)), _sampling({**self._sampling, **sampling})
        if notice := backend_reward_model_notice(self._backend, list(dict.fromkeys(names))):
            log_notice(notice)
        read = [self._read(each, tools, number) for number, each in enumerate(questions, start=1)]
        requests = list(zip(names, read))
        return self._backend.answers(requests, config, on_text=on_text) if requests else []

    def rewards(
        self,
        conversations: Judged | Sequence[Judged],
        adapter: str | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Any:
        """What a reward model (`objective: reward`) gives for an answer: a number, the higher the better, which is only
        compared with those for other answers to the same question; of a list of conversations, a list of numbers.

        conversations   OpenAI's messages that end in the assistant's answer, or a list of such lists
        adapter         the reward model: one of `adapters`. Left out: the only one of them that is one
        tools           functions that could be called, as OpenAI's schemas

        Raises ModelError for what is no reward model; DataError for a conversation without an answer at its end, or
        longer than the model read in training (`data.max_length`); ConfigError for several adapters.
        """
        inference = self.inference
        reward_models = list(inference.value_heads)
        if adapter is None and len(reward_models) != 1:
            which = "train one with objective: reward"
            if reward_models:
                which = f"say which: adapter= one of {', '.join(reward_models)}"
            raise ModelError(f"there are {len(reward_models)} reward models here; {which}")
        several = not _is_one(conversations)
        given: Any = adapter
        if not isinstance(given, (str, type(None))):
            raise ConfigError(f"adapter: the name of one reward model, got {_short(given)}; ask each in its own call")
        read = [
            _read_turns(each, tools, number, conversation)
            for number, each in enumerate(cast(Sequence[Any], conversations) if several else [conversations], start=1)
        ]
        found = inference.rewards([(adapter or reward_models[0], each) for each in read])
        return found if several else found[0]

    def compare(self, question: Question, **sampling: Any) -> dict[str, str]:
        """What the base and every adapter answer to one question, by name; all in the same forward passes."""
        names, config = self._backend.names, _sampling({**self._sampling, **sampling})
        conversation = self._read(question, (), 1)
        answers = self._backend.answers([(name, conversation) for name in names], config)
        return {name: each.text for name, each in zip(names, answers)}

    def _read(self, question: Any, tools: Sequence[Mapping[str, Any]], number: int) -> Conversation:
        """With the system prompt of the file it was loaded from, unless it has one of its own."""
        read = _conversation(question, tools, number)
        if self._system is None or (read.messages[:1] and read.messages[0].role == "system"):
            return read
        return replace(read, messages=(Message("system", self._system), *read.messages))

    def _each_chosen(self, adapter: str | Sequence[str | None] | None, questions: int) -> list[str]:
        """Who answers each of so many questions. ModelError lists every name that is not there, ConfigError is for
        another number of names."""
        if adapter is None or isinstance(adapter, str):
            return [self._chosen(adapter)] * questions
        given: Any = adapter
        are_names = isinstance(given, (list, tuple)) and all(isinstance(each, (str, type(None))) for each in given)
        if not are_names or len(adapter) != questions:
            counted = f"{len(adapter)} names" if are_names else _short(adapter)
            raise ConfigError(
                f"adapter: one name for all, or a list of one for each of the {questions} questions, got {counted}; "
                f"{_EACH}"
            )
        names: list[str] = []
        problems: list[str] = []
        for number, each in enumerate(adapter, start=1):
            try:
                names.append(self._chosen(each))
            except ModelError as error:
                problems.append(f"question {number}: {error}")
        raise_all(ModelError, "adapter: these cannot answer:", problems)
        return names

    def _chosen(self, adapter: str | None) -> str:
        if adapter is None and len(self.adapters) > 1:
            raise ModelError(
                f"there are {len(self.adapters)} adapters; say which: adapter= one of {', '.join(self.adapters)}"
            )
        name = adapter or next(iter(self.adapters), BASE_NAME)
        self._backend.slot(name)
        return name

    def close(self) -> None:
        """Give back what it holds: llama.cpp's threads and memory; the weights of ours go with the object."""
        if isinstance(self._backend, GgufChatBackend):
            self._backend.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Model(adapters={self.adapters})"


@known_keywords
def load(
    path: str | Path,
    *,
    which: Literal["best", "last"] = "best",
    adapters: Sequence[str | Path] | Mapping[str, str | Path] = (),
    chat_template: str | None = None,
    base: str | None = None,
    compile: bool = False,
    notify: Callable[[str], None] = log_notice,
    allow_code: bool = False,
) -> Model:
    """Load what `path` names, which is what the command line takes: a run folder (all its jobs), one of its
    checkpoints, an adapter's folder (PEFT's too), a model's, a hub name, a .gguf file, or a LLaMA-Factory YAML, whose
    system prompt and sampling settings (temperature, top_p ...) become the defaults of every question.

        model = lowrank.load("Qwen/Qwen3-0.6B", adapters=["peft/poet", "runs/first/default/best"])
        model.generate("Hello", "poet")

    Adapters are named by where they come from: one in a run's folder by its job (here "default"), any other by its
    folder (here "poet"), one on the hub by its name without the owner.

    which           a run's best or last adapters
    adapters        more adapters on the same base: folders (PEFT's too), runs or jobs, hub names; beside a .gguf file
                    LoRA files. A mapping names them: `{"mild": "runs/a/default", "wild": "runs/b/default"}`
    chat_template   a built-in one or a .jinja file, instead of the run's or the tokenizer's
    base            where the base of the run or adapter is now
    compile         answer through decoder layers compiled by torch: the first steps take up to a minute
    allow_code      the model's own code, or an adapter's, may run

    Raises ModelError, ConfigError.
    """
    with code_allowed(allow_code):
        by_name = isinstance(adapters, Mapping)
        more = {name: str(each) for name, each in adapters.items()} if by_name else [str(each) for each in adapters]
        theirs = answering_file(str(path))
        if theirs is not None:
            path, base, chat_template = theirs.model, base or theirs.base, chat_template or theirs.chat_template
            for note in theirs.notes:
                notify(note)
        backend = open_chat_backend(
            str(path),
            adapters=more,
            which=which,
            chat_template=chat_template,
            base=base,
            compile=compile,
            notify=notify,
        )
        return Model(backend) if theirs is None else Model(backend, system=theirs.system, sampling=theirs.sampling)


def generate(
    model: Model | str | Path,
    question: Question | Sequence[Question],
    adapter: str | Sequence[str | None] | None = None,
    *,
    allow_code: bool = False,
    **sampling: Any,
) -> Any:
    """`Model.generate` of a loaded model, or of a path, which is loaded for this one call."""
    if isinstance(model, Model):
        return model.generate(cast(Any, question), adapter, **sampling)
    with load(model, allow_code=allow_code) as loaded:
        return loaded.generate(cast(Any, question), adapter, **sampling)


_EACH = "what all of them answer to one question is model.compare(question)"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_one(question: Any) -> bool:
    """A text or a conversation, and no list of them."""
    if isinstance(question, (str, Conversation)):
        return True
    return bool(question) and all(isinstance(each, Mapping) for each in question)


def _conversation(question: Any, tools: Sequence[Mapping[str, Any]], number: int) -> Conversation:
    return _read_turns(question, tools, number, prompt)


def _read_turns(
    given: Any, tools: Sequence[Mapping[str, Any]], number: int, whole: Callable[..., Conversation]
) -> Conversation:
    """`whole`: `prompt` for what waits for an answer, `conversation` for what ends in one."""
    if isinstance(given, Conversation):
        return given
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
    try:
        return open_parts(whole(read_turns(messages, {}), read_tools(list(tools)) if tools else ()))
    except RowProblem as error:
        what = "question" if whole is prompt else "conversation"
        raise DataError(f"{what} {number}: {error}") from error


def _sampling(options: Mapping[str, Any]) -> GenerationConfig:
    return settings_of(GenerationConfig, options, "generate: these options cannot be used")

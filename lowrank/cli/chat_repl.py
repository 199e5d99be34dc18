"""The chat REPL: history, /commands, one model streamed or several side by side."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lowrank.data.formats.turns import with_thought_apart
from lowrank.errors import ConfigError, DataError, LowrankError, did_you_mean
from lowrank.generate.request import Answer, GenerationConfig
from lowrank.media.decoding import examine, read_file
from lowrank.pipelines.inference import BASE_NAME
from lowrank.records import Conversation, Message, Picture
from lowrank.serve.chat_backends import ChatBackend
from lowrank.terminal import Console, printable

readline: Any = importlib.import_module("readline") if importlib.util.find_spec("readline") else None
"""Line editing; not on Windows, whose console edits lines itself."""

IMAGE_COMMAND = "/image "
EXIT_COMMANDS = ("/exit", "/quit")

_HELP = """/adapter NAME ...  who answers; several answer side by side, `base` is the untouched model
/base             ask the untouched base the last question again
/image PATH       show a picture with the next question
/system TEXT      set the system prompt and start anew; /system alone clears it
/temperature X    0 takes the likeliest token
/top_p X          draw from the likeliest tokens with this probability in all
/top_k N          draw from this many likeliest tokens; 0: all
/min_p X          leave out tokens with less than this share of the likeliest one's probability
/penalty X        repetition penalty; 1: none
/seed N           makes draws repeatable; /seed alone: not any more
/sampling         show how answers are drawn
/max N            tokens of one answer at the most
/undo             take back the last question and its answer
/reset            start anew
/template [NAME]  the chat template of the first model, or of NAME, and the last conversation as it is read
/exit             leave (or Ctrl-D)"""


def read_pictures(paths: Iterable[str | Path]) -> list[Picture]:
    """The pictures in these files. DataError with every one that cannot be shown."""
    pictures: list[Picture] = []
    problems: list[str] = []
    for each in paths:
        path = Path(each).expanduser()
        try:
            pictures.append(examine(read_file(path, str(each)), str(each), str(path)))
        except DataError as problem:
            problems.append(str(problem))
    if problems:
        raise DataError("\n".join(problems))
    return pictures


class ChatRepl:
    """One conversation. The history is that of the first model."""

    def __init__(
        self,
        backend: ChatBackend,
        config: GenerationConfig,
        *,
        system: str | None = None,
        model_names: Sequence[str] | None = None,
        pictures: Iterable[Picture] = (),
        stderr: bool = False,
    ) -> None:
        """`stderr`: what is no answer goes there, as answers are read by a program."""
        self.backend = backend
        self.config = config
        self.console = Console(highlight=False, stderr=stderr)
        self.system = system
        self.model_names = list(
            dict.fromkeys(model_names or [next((n for n in backend.names if n != BASE_NAME), BASE_NAME)])
        )
        for model_name in self.model_names:
            backend.slot(model_name)
        self.history: list[Message] = []
        self._speed = 0.0
        self.reset()
        self.show_pictures(pictures)

    def reset(self) -> None:
        """Forget what was said."""
        self.pictures: list[Picture] = []
        self.history = [Message("system", self.system)] if self.system else []

    def loop(self) -> None:
        """Until the person leaves."""
        self._complete_with_tab()
        self._introduce()
        prompt = "> " if self.console.no_color else "\001\033[1;32m\002> \001\033[0m\002"  # readline counts no colors
        while True:
            try:
                line = input(prompt).strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line in EXIT_COMMANDS:
                return
            try:
                if line.startswith("/"):
                    self.run_command(line)
                elif line:
                    self.send(line)
            except KeyboardInterrupt:
                self.console.print("\n[dim]stopped[/]")
            except LowrankError as error:
                self.console.print(str(error), style="red", markup=False)

    def _introduce(self) -> None:
        others = [name for name in self.backend.names if name not in self.model_names]
        also = f"; also here: {', '.join(others)}" if others else ""
        verb = "answers" if len(self.model_names) == 1 else "answer"
        text = Text.assemble(
            (" | ".join(self.model_names), "bold"), f" {verb}{also}. /help shows what else can be done."
        )
        self.console.print(text)

    def _complete_with_tab(self) -> None:
        """Commands, and after /adapter the names."""
        if readline is None:
            return

        def complete(text: str, state: int) -> str | None:
            line = readline.get_line_buffer()
            completions = (
                [f"/{name}" for name in (*self._commands(), "exit")] if " " not in line else self.backend.names
            )
            found = [completion for completion in completions if line.startswith("/") and completion.startswith(text)]
            return found[state] if state < len(found) else None

        readline.set_completer_delims(" ")
        readline.set_completer(complete)
        readline.parse_and_bind("tab: complete")

    def show_pictures(self, pictures: Iterable[Picture]) -> None:
        """With the next question."""
        self.pictures.extend(pictures)

    def send(self, question: str) -> None:
        """Put a question and print the answer, streamed if there is one model."""
        conversation = self._with(question)
        if len(self.model_names) > 1:
            answers = self._answers(conversation)
            self._side_by_side(answers)
            if self.console.is_terminal:
                self.console.print(f"{len(answers)} models · {self._speed:.0f} tokens/s in all", style="dim")
        else:
            answers = {self.model_names[0]: self._stream(self.model_names[0], conversation)}
        self.pictures = []
        self.history = [*conversation.messages, with_thought_apart(answers[self.model_names[0]])]

    def send_quietly(self, question: str) -> dict[str, str]:
        """Put a question; each model's answer."""
        conversation = self._with(question)
        answers = self._answers(conversation)
        self.pictures = []
        self.history = [*conversation.messages, with_thought_apart(answers[self.model_names[0]])]
        return answers

    def _with(self, question: str) -> Conversation:
        question = question.encode("utf-8", "replace").decode()  # half a character from a shell is no text
        media = tuple((0, picture) for picture in self.pictures)
        return Conversation((*self.history, Message("user", question, media=media)))

    def _answers(self, conversation: Conversation) -> dict[str, str]:
        started = time.perf_counter()
        found = self.backend.answers([(model_name, conversation) for model_name in self.model_names], self.config)
        self._speed = sum(len(each.tokens) for each in found) / (time.perf_counter() - started)
        return {model_name: self._text(model_name, answer) for model_name, answer in zip(self.model_names, found)}

    def _text(self, model_name: str, answer: Answer) -> str:
        """Its whole text; what went wrong is said on the screen and is no part of the conversation."""
        if answer.error is not None:
            self.console.print(f"{model_name}: no answer: {answer.error}", style="red", markup=False)
        return answer.text

    def _stream(self, model_name: str, conversation: Conversation) -> str:
        started = time.perf_counter()
        pieces: list[str] = []

        def show(text: str) -> None:
            pieces.append(text)
            sys.stdout.write(printable(text))
            sys.stdout.flush()

        (found,) = self.backend.answers([(model_name, conversation)], self.config, on_text=show)
        answer = self._text(model_name, found)
        sys.stdout.write(printable(answer[len("".join(pieces)) :]) + "\n")
        if self.console.is_terminal:
            speed = len(found.tokens) / (time.perf_counter() - started)
            self.console.print(f"{model_name} · {speed:.0f} tokens/s", style="dim", markup=False)
        return answer

    def _side_by_side(self, answers: dict[str, str]) -> None:
        table = Table(expand=True)
        for model_name in answers:
            table.add_column(Text(model_name), ratio=1, overflow="fold")
        table.add_row(*(Text(printable(answer.strip("\n"))) for answer in answers.values()))
        self.console.print(table)

    def run_command(self, line: str) -> None:
        """Run the command of a line that begins with `/`. ConfigError for an unknown one or a value that is none."""
        name, _, rest = line[1:].partition(" ")
        commands = self._commands()
        if name not in commands:
            raise ConfigError(
                f"there is no /{name}{did_you_mean(name, (*commands, 'exit'))}; /help lists what there is"
            )
        commands[name](rest.strip())

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "help": lambda _: self.console.print(_HELP, markup=False),
            "adapter": self._choose,
            "base": self._send_to_base,
            "image": self._show_image,
            "system": self._set_system,
            "temperature": lambda value: self._set(temperature=value),
            "top_p": lambda value: self._set(top_p=value),
            "top_k": lambda value: self._set(top_k=value),
            "min_p": lambda value: self._set(min_p=value),
            "penalty": lambda value: self._set(repetition_penalty=value),
            "seed": lambda value: self._set(seed=value or None),
            "sampling": lambda _: self._show_sampling(),
            "max": lambda value: self._set(max_new_tokens=value),
            "undo": lambda _: self._undo(),
            "reset": lambda _: self.reset(),
            "template": self._show_template,
        }

    def _choose(self, names: str) -> None:
        wanted = names.replace(",", " ").split()
        if not wanted:
            self.console.print(f"there are {', '.join(self.backend.names)}", markup=False)
            return
        for name in wanted:
            self.backend.slot(name)
        self.model_names = list(dict.fromkeys(wanted))

    def _send_to_base(self, _: str) -> None:
        self._stream(BASE_NAME, self._last_question())

    def base_quietly(self) -> tuple[str, str]:
        """The last question, and the untouched base's answer to it."""
        question = self._last_question()
        (found,) = self.backend.answers([(BASE_NAME, question)], self.config)
        return question.messages[-1].content, self._text(BASE_NAME, found)

    def _last_question(self) -> Conversation:
        questions = [index for index, message in enumerate(self.history) if message.role == "user"]
        if not questions:
            raise ConfigError("nothing was asked yet")
        return Conversation(tuple(self.history[: questions[-1] + 1]))

    def _show_image(self, name: str) -> None:
        if not name:
            raise ConfigError("name a picture's file: /image cat.png")
        (picture,) = read_pictures([name])
        self.show_pictures([picture])
        self.console.print(f"{name}: {picture.width} x {picture.height}, with the next question", markup=False)

    def _set_system(self, text: str) -> None:
        self.system = text or None
        self.reset()

    def _set(self, **changes: str | None) -> None:
        try:
            self.config = GenerationConfig(**{**self.config.model_dump(), **changes})  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(f"not a number that fits: {next(iter(changes.values()))!r}") from error

    def _undo(self) -> None:
        questions = [index for index, message in enumerate(self.history) if message.role == "user"]
        if questions:
            self.history = self.history[: questions[-1]]

    def _show_sampling(self) -> None:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_new_tokens")
        self.console.print(", ".join(f"{name} {getattr(self.config, name)}" for name in names), markup=False)

    def _show_template(self, name: str) -> None:
        conversation = Conversation(tuple(self.history)) if self.history else self._with("...")
        if conversation.messages[-1].role == "assistant":
            conversation = Conversation(conversation.messages[:-1])
        reading = self.backend.render_prompt(name or self.model_names[0], conversation)
        self.console.print(reading.chat_template, style="dim", markup=False)
        self.console.print(reading.prompt, markup=False)
        self.console.print(f"an answer ends at {', '.join(map(repr, reading.ends))}", style="dim", markup=False)

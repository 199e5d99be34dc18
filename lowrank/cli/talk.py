"""A conversation at the terminal: history, /commands, one voice streamed or several side by side."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from lowrank.errors import LowrankError
from lowrank.generate.sampler import Config
from lowrank.records import Conversation, Message
from lowrank.trained import BARE, Trained

_HELP = """/adapter NAME ...  who answers; several answer side by side, `base` is the untouched model
/base             ask the untouched base the last question again
/system TEXT      set the system prompt and start anew; /system alone clears it
/temperature X    0 takes the likeliest token
/max N            tokens of one answer at the most
/undo             take back the last question and its answer
/reset            start anew
/template         show the last conversation as the model reads it
/exit             leave (or Ctrl-D)"""


class Talk:
    """One conversation. The history is that of the first voice."""

    def __init__(
        self, trained: Trained, config: Config, *, system: str | None = None, voices: Sequence[str] | None = None
    ) -> None:
        self.trained = trained
        self.config = config
        self.console = Console(highlight=False)
        self.system = system
        self.voices = list(voices) if voices else [next((n for n in trained.slots if n != BARE), BARE)]
        for voice in self.voices:
            trained.slot(voice)
        self.history: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.history = [Message("system", self.system)] if self.system else []

    def loop(self) -> None:
        """Until the person leaves."""
        others = [name for name in self.trained.slots if name not in self.voices]
        self.console.print(f"[bold]{' | '.join(self.voices)}[/] answers; there are also {', '.join(others)}. /help")
        while True:
            try:
                line = self.console.input("[bold green]> [/]").strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line in ("/exit", "/quit"):
                return
            try:
                self._line(line)
            except KeyboardInterrupt:
                self.console.print("\n[dim]stopped[/]")
            except LowrankError as error:
                self.console.print(f"[red]{error}[/]")

    def ask(self, question: str) -> None:
        """Put a question and print the answer, streamed if there is one voice."""
        conversation = self._with(question)
        if len(self.voices) > 1:
            answers = self._answers(conversation)
            self._side_by_side(answers)
        else:
            answers = {self.voices[0]: self._stream(self.voices[0], conversation)}
        self.history = [*conversation.messages, Message("assistant", answers[self.voices[0]])]

    def ask_quietly(self, question: str) -> dict[str, str]:
        """Put a question; each voice's answer."""
        conversation = self._with(question)
        answers = self._answers(conversation)
        self.history = [*conversation.messages, Message("assistant", answers[self.voices[0]])]
        return answers

    def _with(self, question: str) -> Conversation:
        return Conversation((*self.history, Message("user", question)))

    def _answers(self, conversation: Conversation) -> dict[str, str]:
        answers = self.trained.answer([(voice, conversation) for voice in self.voices], self.config)
        return dict(zip(self.voices, answers))

    def _stream(self, voice: str, conversation: Conversation) -> str:
        started = time.perf_counter()
        pieces: list[str] = []

        def hear(text: str) -> None:
            pieces.append(text)
            sys.stdout.write(text)
            sys.stdout.flush()

        (answer,) = self.trained.answer([(voice, conversation)], self.config, on_text=hear)
        sys.stdout.write(answer[len("".join(pieces)) :] + "\n")
        if self.console.is_terminal:
            tokens = len(self.trained.base.tokenizer(answer)["input_ids"])
            self.console.print(f"[dim]{voice} · {tokens / (time.perf_counter() - started):.0f} tokens/s[/]")
        return answer

    def _side_by_side(self, answers: dict[str, str]) -> None:
        table = Table(*answers, expand=True)
        table.add_row(*answers.values())
        self.console.print(table)

    def _line(self, line: str) -> None:
        if not line.startswith("/"):
            if line:
                self.ask(line)
            return
        name, _, rest = line[1:].partition(" ")
        command = self._commands().get(name)
        if command is None:
            self.console.print(f"there is no /{name}\n{_HELP}")
        else:
            command(rest.strip())

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "help": lambda _: self.console.print(_HELP, markup=False),
            "adapter": self._choose,
            "base": self._ask_base,
            "system": self._set_system,
            "temperature": lambda value: self._set(temperature=value),
            "max": lambda value: self._set(max_new_tokens=value),
            "undo": lambda _: self._undo(),
            "reset": lambda _: self.reset(),
            "template": lambda _: self._show_template(),
        }

    def _choose(self, names: str) -> None:
        wanted = names.replace(",", " ").split()
        if not wanted:
            self.console.print(f"there are {', '.join(self.trained.slots)}")
            return
        for name in wanted:
            self.trained.slot(name)
        self.voices = wanted

    def _ask_base(self, _: str) -> None:
        questions = [index for index, message in enumerate(self.history) if message.role == "user"]
        if not questions:
            self.console.print("nothing was asked yet")
            return
        self._stream(BARE, Conversation(tuple(self.history[: questions[-1] + 1])))

    def _set_system(self, text: str) -> None:
        self.system = text or None
        self.reset()

    def _set(self, **changes: str) -> None:
        try:
            self.config = Config(**{**self.config.model_dump(), **changes})  # type: ignore[arg-type]
        except ValueError:
            self.console.print(f"[red]not a number that fits: {next(iter(changes.values()))!r}[/]")

    def _undo(self) -> None:
        questions = [index for index, message in enumerate(self.history) if message.role == "user"]
        if questions:
            self.history = self.history[: questions[-1]]

    def _show_template(self) -> None:
        conversation = Conversation(tuple(self.history)) if self.history else self._with("...")
        if conversation.messages[-1].role == "assistant":
            conversation = Conversation(conversation.messages[:-1])
        tokens = self.trained.renderer.prompt(conversation)
        self.console.print(self.trained.base.tokenizer.decode(tokens), markup=False)

"""The command line. `lowrank --help` imports no command, and so neither torch nor transformers.

A command is one file of this folder with a function of its name; its imports stand in that function.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lowrank.errors import LowrankError

COMMANDS = {
    "train": "Train the jobs of a configuration file.",
    "plan": "Tell what a run will need and how long it will take, before loading the model.",
    "data": "Look through the data before training on it.",
    "show": "Print the configuration as it will be used.",
    "chat": "Talk to a base or to a trained adapter.",
    "quantize": "Write a quantised copy of a model, which loads faster and anywhere.",
    "expand": "Write a copy of a model with new layers that change nothing yet, to train them alone (LLaMA Pro).",
    "vocab": "Write a copy of a model with more tokens in its vocabulary.",
    "doctor": "What this machine and each storage can do, found out by trying.",
    "serve": "Answer OpenAI clients: the base and every adapter, loaded and replaced while it runs.",
    "predict": "Let every adapter answer the questions of a file, and compare them with the base.",
    "eval": "Run lm-eval's benchmarks on every adapter at once.",
    "report": "Write report.html, one page with everything about a run.",
    "export": "Take a trained model home: PEFT adapter, merged model, and other forms, each compared with it.",
    "deploy": "Make an export a model of a running Ollama server.",
    "demo": "Train three jobs on the base that ships with lowrank, in minutes.",
}
"""Each is `lowrank.cli.<name>:<name>`; one whose file is not there is not offered."""

EXIT_CODES = {
    0: "done",
    1: "an unexpected error (with a traceback)",
    2: "the command line or the configuration",
    3: "the data",
    4: "the base model or an adapter",
    5: "the run folder, or where an export goes",
    6: "an exported model differs from what was trained",
    130: "interrupted with Ctrl-C; a training run has saved a checkpoint",
}
"""What the program returns, and what each means."""

CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]  # click's ClickException, which typer does not export


class LazyCommand(TyperCommand):
    """A command known by its name and one line of help until it is run."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """The context of the real command, which is imported here."""
        function = getattr(importlib.import_module(f"lowrank.cli.{self.name}"), str(self.name))
        inner = typer.Typer(add_completion=False)
        inner.command(name=self.name, help=COMMANDS[str(self.name)] + "\n\n" + (function.__doc__ or ""))(function)
        return typer.main.get_command(inner).make_context(*args, **kwargs)


class LazyGroup(TyperGroup):
    """The commands of `COMMANDS` whose file is there."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of `COMMANDS`."""
        return [name for name in COMMANDS if importlib.util.find_spec(f"lowrank.cli.{name}") is not None]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Without importing it."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return LazyCommand(name=cmd_name, help=COMMANDS[cmd_name], callback=None)


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they would print local variables, tokens among them
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lowrank {importlib.metadata.version('lowrank')}")
        raise typer.Exit


@app.callback()
def _lowrank(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune language models: one frozen base, any number of LoRA adapters."""


def main(words: list[str] | None = None) -> None:
    """Run the command line (`sys.argv` by default) and exit with one of `EXIT_CODES`."""
    if words is None:
        words = sys.argv[1:]
        if words[:1] in (["train"], ["demo"]):
            from lowrank.kernels.host_memory import start_again_without_cache

            start_again_without_cache()
    as_json = "--json" in words
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no line per attempt; our error says what could not be had
    if os.getcwd() not in sys.path:
        sys.path.append(
            os.getcwd()
        )  # a person's own `my_module:MyThing` lies where they are; last, so it hides nothing
    try:
        # In standalone mode typer prints its own errors and exits.
        code = app(words, prog_name="lowrank", standalone_mode=not as_json)
    except LowrankError as error:
        code = _say(error, str(error), error.exit_code, as_json)
    except CommandLineError as error:
        code = _say(error, getattr(error, "format_message", error.__str__)(), 2, as_json)
    sys.exit(code if isinstance(code, int) else 0)


def _say(error: Exception, message: str, code: int, as_json: bool) -> int:
    if as_json:
        kind = type(error).__name__ if isinstance(error, LowrankError) else "CommandLineError"
        print(json.dumps({"error": {"type": kind, "message": message, "exit_code": code}}, ensure_ascii=False))
    else:
        typer.secho(message, fg=typer.colors.RED, err=True)
    return code

"""The command line. `lowrank --help` imports no command, and so neither torch nor transformers.

A command is one file of this folder with a function of its name; its imports stand in that function.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
import typing
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lowrank import __version__
from lowrank.cli.interrupts import end_at_once
from lowrank.cli.renamed_options import refuse_renamed
from lowrank.errors import (
    LowrankError,
    explain_bad_paths,
    explain_disk_full,
    explain_lost_network,
    shortened,
)
from lowrank.terminal import safe_streams, visible
from lowrank.third_party import code_allowed

COMMANDS = {
    "board": "Everything in a browser: choose, look, start, watch, try, export.",
    "train": "Train the jobs of a configuration file.",
    "jobs": "List the jobs of a run: how far they are, what their curves say, how long they take.",
    "add": "Give a run that trains one job more.",
    "stop": "End a job of a run that trains, or the run.",
    "pause": "Let a job of a run that trains take no steps for now.",
    "resume": "Let a job go on that was paused.",
    "clone": "Give a run that trains a second job like one it has, with other settings.",
    "set": "Change the learning rate and the like of a job while it trains.",
    "priority": "Say which jobs of a run are given a slot first.",
    "plan": "Tell what a run will need and how long it will take, before loading the model.",
    "data": "Look through the data before training on it.",
    "show": "Print the configuration as it will be used.",
    "chat": "Talk to a base or to a trained adapter.",
    "quantize": "Write a quantized copy of a model, which loads faster and anywhere.",
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

_CONTRIB = "lowrank.contrib.commands"

_STEERS = {"jobs", "add", "stop", "pause", "resume", "clone", "set", "priority"}
MAY_RUN_CODE = frozenset(COMMANDS) - {"board", "quantize", "doctor", "deploy", "demo"} - _STEERS
"""Commands that read settings or a model: what those name may be code, which runs only with `--allow-code`."""

LOADS_WEIGHTS = frozenset({"train", "demo", "chat", "quantize", "serve", "predict", "eval", "export", "deploy"})
"""Commands whose process is for a model alone, so that they may set the allocator up for it."""

ONLY_LOOKS = frozenset({"data", "plan", "show"})
"""Commands that read and print, so that most of their time is imports."""

_ALLOW_CODE = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Run Python code that the settings name (my_module:MyThing) or that comes with the model; read it first.",
    ),
]

EXIT_CODES = {
    0: "done",
    1: "an unexpected error (with a traceback)",
    2: "the command line or the configuration",
    3: "the data",
    4: "the base model or an adapter",
    5: "the run folder, or where an export goes",
    6: "an exported model differs from what was trained",
    7: "a job ended because its loss was not finite; the others are whole",
    130: "interrupted (Ctrl-C, SIGTERM, SIGHUP, a stop file); a training run has saved a checkpoint",
}
"""What the program returns, and what each means."""

CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]  # click's ClickException, which typer does not export


_INTERRUPTED = "interrupted before there was anything new to save"


class Interrupted(LowrankError):
    """Ctrl-C, or what stands for it, before there was anything to save."""

    exit_code = 130


def _commands() -> dict[str, str]:
    """Ours, and those that lie in contrib, which is asked by its name."""
    return {**COMMANDS, **importlib.import_module(_CONTRIB).COMMANDS}


def _module_of(name: str) -> str:
    room = "lowrank.cli" if name in COMMANDS else _CONTRIB
    return f"{room}.{name.replace('-', '_')}"


class LazyCommand(TyperCommand):
    """A command known by its name and one line of help until it is run."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """The context of the real command, which is imported here."""
        refuse_renamed(str(self.name), kwargs.get("args") or (args[1] if len(args) > 1 else ()))
        function = getattr(importlib.import_module(_module_of(str(self.name))), str(self.name).replace("-", "_"))
        function = _interruptible(function)
        if self.name in MAY_RUN_CODE:
            function = _with_door(function)
        inner = typer.Typer(add_completion=False)
        inner.command(name=self.name, help=(self.help or "") + "\n\n" + (function.__doc__ or ""))(function)
        return typer.main.get_command(inner).make_context(*args, **kwargs)


def _interruptible(function: Callable[..., None]) -> Callable[..., None]:
    """The command with an interruption as an error of ours, so that it is told like any other, in JSON too."""

    @functools.wraps(function)
    def interruptible(*given: Any, **arguments: Any) -> None:
        try:
            function(*given, **arguments)
        except KeyboardInterrupt as error:
            raise Interrupted(str(error) or "interrupted") from error

    return interruptible


def _with_door(function: Callable[..., None]) -> Callable[..., None]:
    """The command with the option that opens the door of third_party.py while it runs."""

    @functools.wraps(function)
    def opened(*, allow_code: bool, **arguments: Any) -> None:
        with code_allowed(allow_code):
            function(**arguments)

    hints: dict[str, Any] = {**typing.get_type_hints(function, include_extras=True), "allow_code": _ALLOW_CODE}
    given = [each.replace(annotation=hints[name]) for name, each in inspect.signature(function).parameters.items()]
    more = inspect.Parameter("allow_code", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_ALLOW_CODE)
    vars(opened).update(__signature__=inspect.Signature([*given, more]))
    opened.__annotations__ = hints
    return opened


class LazyGroup(TyperGroup):
    """The commands of `COMMANDS` whose file is there."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of `COMMANDS`, then those of contrib."""
        return [name for name in _commands() if importlib.util.find_spec(_module_of(name)) is not None]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Without importing it."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return LazyCommand(name=cmd_name, help=_commands()[cmd_name], callback=None)


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they would print local variables, tokens among them
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lowrank {__version__}")
        raise typer.Exit


@app.callback()
def _lowrank(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune language models: one frozen base, any number of LoRA adapters."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (`sys.argv` by default) and exit with one of `EXIT_CODES`."""
    with safe_streams():
        _main(arguments)


def _main(arguments: list[str] | None) -> None:
    own_process = arguments is None
    if arguments is None:
        arguments = sys.argv[1:]
        if arguments[:1] in (["train"], ["demo"]):
            from lowrank.kernels.glibc_malloc import start_again_without_cache

            start_again_without_cache()
        if set(arguments[:1]) & ONLY_LOOKS:
            gc.set_threshold(1_000_000)  # imports make little garbage; to look for it takes a seventh of the time
    if arguments[:1] and arguments[0] in LOADS_WEIGHTS:
        from lowrank.kernels.device_memory import use_expandable_segments
        from lowrank.kernels.glibc_malloc import keep_freed_memory

        use_expandable_segments()
        keep_freed_memory()  # here and not where models load: a library leaves its caller's process alone
    as_json = "--json" in arguments
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no line per attempt; our error says what could not be had
    ends_at_once = functools.partial(_ends_at_once, as_json=as_json) if own_process else lambda _: nullcontext()
    try:
        with ends_at_once(arguments):
            commands = _as_ours(arguments)
    except LowrankError as error:
        sys.exit(_report_error(error, str(error), error.exit_code, as_json))
    for command in commands:
        with ends_at_once(command):
            code = _run(command, as_json)
        if code:
            sys.exit(code)
    sys.exit(0)


def _run(arguments: list[str], as_json: bool) -> int:
    """One command; its exit code."""
    try:
        # In standalone mode typer prints its own errors and exits.
        with explain_disk_full(), explain_bad_paths(), explain_lost_network():
            code = app(arguments, prog_name="lowrank", standalone_mode=not as_json)
    except SystemExit as end:
        code = end.code
    except LowrankError as error:
        code = _report_error(error, str(error), error.exit_code, as_json)
    except CommandLineError as error:
        code = _report_error(error, getattr(error, "format_message", error.__str__)(), 2, as_json)
    except (KeyboardInterrupt, typer.Abort) as error:
        code = _report_error(error, "interrupted", 130, as_json)
    except Exception as error:
        if not as_json:
            raise
        traceback.print_exc()
        code = _report_error(error, f"{type(error).__name__}: {error}"[:2000], 1, as_json)
    return code if isinstance(code, int) else 0


def _as_ours(arguments: list[str]) -> list[list[str]]:
    """The words, or the commands that stand for them where they are LLaMA-Factory's: its files, flags, commands."""
    flags = any(argument.startswith("--model") for argument in arguments)
    files = any(argument.lower().endswith((".yaml", ".yml", ".json")) for argument in arguments[1:2])
    if not arguments or (arguments[0] in _commands() and not flags and not files) or arguments[0].startswith("-"):
        return [arguments]
    from lowrank.cli.warn import warn
    from lowrank.compat.llamafactory.commands import translate

    translated = translate(arguments)
    warn(translated.notes)
    if translated.read_as:
        typer.echo(visible(translated.read_as), err=True)
    return [*translated.first, translated.arguments or arguments, *translated.then]


def _ends_at_once(arguments: list[str], as_json: bool) -> AbstractContextManager[None]:
    """While `lowrank train` has nothing to save, a signal ends it at once, with its closing line."""
    if arguments[:1] != ["train"]:
        return nullcontext()
    closing = json.dumps(_closing("Interrupted", _INTERRUPTED, 130)) if as_json else _INTERRUPTED
    return end_at_once(1 if as_json else 2, closing)


def _closing(kind: str, message: str, code: int) -> dict[str, Any]:
    """The last line of --json where there is no result."""
    return {"error": {"type": kind, "message": message, "exit_code": code}}


def _report_error(error: BaseException, message: str, code: int, as_json: bool) -> int:
    message = shortened(message)
    if isinstance(error, LowrankError):
        kind = type(error).__name__
    else:
        kind = {1: "UnexpectedError", 130: "Interrupted"}.get(code, "CommandLineError")
    try:
        if as_json:
            print(json.dumps(_closing(kind, message, code), ensure_ascii=False), flush=True)
            return code
    except OSError:  # the error may be that nothing can be written there: a full disk, a reader that is gone
        pass
    typer.secho(visible(message), fg=typer.colors.RED, err=True)
    return code

"""`lowrank chat`: talk to a base, an adapter, or all adapters of a run."""

from __future__ import annotations

import io
import json as json_format
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank.cli.sampling import Compile, MaxNewTokens, RepetitionPenalty, Temperature, TopK, TopP
from lowrank.cli.shared_options import Base, ChatTemplate, Last

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lowrank.cli.chat_repl import ChatRepl


def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="A run folder, one of its checkpoints, an adapter folder, a model, a .gguf file.",
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            help="Who answers; r8,r64 or given twice: side by side. `base`: no adapter. An adapter's folder is loaded "
            "on the model; with a .gguf file: LoRA files.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this one question and leave.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image", help="Show this picture with the first question; given twice: both.", show_default=False
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    chat_template: ChatTemplate = None,
    seed: Annotated[int | None, typer.Option(help="Makes draws repeatable.")] = None,
    base: Base = None,
    last: Last = False,
    compile: Compile = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per answer.")] = False,
) -> None:
    """Type /help for what can be done besides talking.

    Questions may also come through a pipe, one a line; they are one conversation. A line of it that begins with `/` is
    a command too: `/image PATH` shows a picture with the next question.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    from lowrank.cli.chat_repl import ChatRepl, read_pictures
    from lowrank.cli.warn import warn
    from lowrank.generate.request import GenerationConfig
    from lowrank.serve.chat_backends import adapters_among, backend_reward_model_notice, open_chat_backend

    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    pictures = read_pictures(image or ())  # what cannot be shown is said before the model loads
    which = "last" if last else "best"
    wanted = [name for names in adapter or () for name in names.split(",") if name]
    adapters, model_names = adapters_among(wanted)
    backend = open_chat_backend(
        model,
        adapters=adapters,
        answering=model_names,
        which=which,
        chat_template=chat_template,
        base=base,
        compile=compile,
        notify=lambda text: warn([text]),
    )
    talk = ChatRepl(backend, config, system=system, model_names=model_names, pictures=pictures, stderr=json)
    if notice := backend_reward_model_notice(backend, talk.model_names):
        warn([notice])
    if prompt is not None:
        _submit(talk, prompt, json)
    elif json or not sys.stdin.isatty():
        _submit_lines(talk, json)
    else:
        talk.loop()


def _submit_lines(talk: ChatRepl, json: bool) -> None:
    """What comes through a pipe."""
    from lowrank.cli.chat_repl import EXIT_COMMANDS, IMAGE_COMMAND, read_pictures
    from lowrank.errors import LowrankError
    from lowrank.pipelines.inference import BASE_NAME

    for number, line in enumerate(sys.stdin, start=1):
        if line.startswith(IMAGE_COMMAND):
            talk.show_pictures(read_pictures([line.removeprefix(IMAGE_COMMAND).strip()]))
        elif line.strip() in EXIT_COMMANDS:
            return
        elif json and line.strip() == "/base":
            _print_row(BASE_NAME, *talk.base_quietly())
        elif line.startswith("/"):
            try:
                talk.run_command(line.strip())
            except LowrankError as error:
                raise type(error)(f"line {number}, {line.strip()[:80]}: {error}") from error
        elif line.strip():
            _submit(talk, line.rstrip("\n"), json)


def _submit(talk: ChatRepl, question: str, json: bool) -> None:
    if not json:
        talk.send(question)
        return
    shown = {"images": [picture.name for picture in talk.pictures]} if talk.pictures else {}
    for model_name, answer in talk.send_quietly(question).items():
        _print_row(model_name, question, answer, shown)


def _print_row(model_name: str, question: str, answer: str, shown: Mapping[str, list[str]] | None = None) -> None:
    row = {"adapter": model_name, "question": question, **(shown or {}), "answer": answer}
    print(json_format.dumps(row, ensure_ascii=False))

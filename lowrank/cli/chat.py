"""`lowrank chat`: talk to a base, an adapter, or all adapters of a run."""

from __future__ import annotations

import io
import json as json_format
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lowrank.cli.talk import Talk


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
            help="Who answers; r8,r64 or given twice: side by side. `base`: no adapter. With a .gguf file: LoRA files.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this one question and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer at the most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens with this probability in all.")
    ] = 1.0,
    chat_template: Annotated[
        str | None, typer.Option(help="A built-in template (chatml, llama3, ...) or a .jinja file, instead of its own.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes draws repeatable.")] = None,
    last: Annotated[bool, typer.Option("--last", help="The last adapters of a run instead of the best.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per answer.")] = False,
) -> None:
    """Type /help for what can be done besides talking.

    Questions may also come through a pipe, one a line; they are one conversation.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    from lowrank.cli.speakers import open_speakers
    from lowrank.cli.talk import Talk
    from lowrank.cli.warn import warn
    from lowrank.generate.request import Config

    config = Config(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    which = "last" if last else "best"
    wanted = [name for names in adapter or () for name in names.split(",") if name]
    speakers, voices = open_speakers(
        model, wanted, which=which, chat_template=chat_template, notify=lambda text: warn([text])
    )
    talk = Talk(speakers, config, system=system, voices=voices)
    if prompt is not None:
        _ask(talk, prompt, json)
    elif json or not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                _ask(talk, line.rstrip("\n"), json)
    else:
        talk.loop()


def _ask(talk: Talk, question: str, json: bool) -> None:
    if not json:
        talk.ask(question)
        return
    for voice, answer in talk.ask_quietly(question).items():
        print(json_format.dumps({"adapter": voice, "question": question, "answer": answer}, ensure_ascii=False))

"""`lowrank serve`: a base and any number of adapters, for every OpenAI client."""

from __future__ import annotations

import json as json_format
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank.cli.sampling import Compile
from lowrank.cli.shared_options import Base, ChatTemplate, Host, Last, ModelPath, Port
from lowrank.serve.address import check_host, check_installed, url_of
from lowrank.serve.engines import AUTO, ServingOptions, choose_engine, engine_names, open_engine

if TYPE_CHECKING:
    from lowrank.serve.engine import ServeEngine


def serve(
    model: ModelPath,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token: Annotated[
        str | None,
        typer.Option(help="What clients send as their API key; left out: LOWRANK_TOKEN, or a new one is printed."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="Another name this server is called by.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin", help="A web page that may ask from browsers (CORS), as https://NAME; * for any."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help=f"{', '.join(engine_names())}; auto takes the one that reads the path.")
    ] = AUTO,
    adapters: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapters",
            help="A folder of adapter folders, or an adapter's own: each is served, and more may be loaded from it.",
        ),
    ] = None,
    max_loras: Annotated[int, typer.Option(min=1, help="Adapters kept in memory; others come when asked for.")] = 32,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait; beyond, clients get 429.")] = 256,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Answers in progress at once.")] = 64,
    kv_cache_tokens: Annotated[int, typer.Option(min=256, help="Tokens of the KV cache, of all answers.")] = 65536,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds one request may take, waiting included.")] = 600.0,
    chat_template: ChatTemplate = None,
    base: Base = None,
    compile: Compile = False,
    last: Last = False,
    json: Annotated[
        bool, typer.Option("--json", help="Say address, models and a new key as one line of JSON when it listens.")
    ] = False,
) -> None:
    """OpenAI's /v1/chat/completions, /v1/completions and /v1/models; the base and each adapter are the models.

    `POST /v1/adapters {"name": ..., "path": ...}` loads an adapter or a new version of one, from the run folder or a
    folder given with --adapters; `DELETE /v1/adapters/NAME` takes it away.
    """
    check_installed("serving", "serve")
    from lowrank.cli.interrupts import interruption_message
    from lowrank.cli.warn import warn
    from lowrank.serve.api.app import new_token
    from lowrank.serve.limits import RequestLimits
    from lowrank.serve.server import run

    which = "last" if last else "best"
    options = ServingOptions(
        engine, tuple(adapters or ()), max_loras, max_num_seqs, kv_cache_tokens, chat_template, which, base, compile
    )
    choose_engine(model, options)
    token = token or os.environ.get("LOWRANK_TOKEN") or None
    check_host(host, token)
    logging.basicConfig(level=logging.WARNING)
    served = open_engine(model, options, lambda text: warn([text]))
    key = token or new_token()
    with interruption_message(lambda: "interrupted: it no longer serves"):
        run(
            served,
            host=host,
            port=port,
            token=key,
            hosts=allow_host or (),
            origins=allow_origin or (),
            limits=RequestLimits(max_num_seqs=max_num_seqs, waiting=max_waiting, request_seconds=timeout),
            on_listening=lambda port: _announce(served, host, port, new_key=None if token else key, json=json),
        )


def _announce(served: ServeEngine, host: str, port: int, *, new_key: str | None, json: bool) -> None:
    """Say that it listens, and as whom it answers. A key that the person chose is not printed."""
    names, url = [each.name for each in served.served_models()], f"{url_of(host, port)}/v1"
    if json:
        line = {"event": "listening", "url": url, "host": host, "port": port, "models": names, "key": new_key}
        print(json_format.dumps(line), flush=True)
        return
    print(f"{url} answers as {_named(names)}", flush=True)
    if new_key is not None:
        print(f"API key: {new_key}", flush=True)


def _named(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

"""`lowrank serve`: a base and any number of adapters, for every OpenAI client."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank.errors import ConfigError, ModelError, OutputError

if TYPE_CHECKING:
    from lowrank.generate.generator import GeneratorConfig
    from lowrank.serve.engine import Engine


def serve(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, an adapter folder, or a model.")],
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's need a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(help="What clients send as their API key; left out: LOWRANK_TOKEN, or a new one is printed."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="Another name this server is called by.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="torch, vllm (on a GPU), or llama.cpp for .gguf files; auto: torch or llama.cpp.")
    ] = "auto",
    adapters: Annotated[
        list[Path] | None,
        typer.Option("--adapters", help="A folder of adapter folders: each is served, and more may be loaded from it."),
    ] = None,
    resident: Annotated[int, typer.Option(min=1, help="Adapters kept in memory; others come when asked for.")] = 32,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait; beyond, clients get 429.")] = 256,
    at_once: Annotated[int, typer.Option("--at-once", min=1, help="Answers in the making at once.")] = 64,
    cache_tokens: Annotated[int, typer.Option(min=256, help="Tokens whose keys and values are kept.")] = 65536,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds one request may take, waiting included.")] = 600.0,
    chat_template: Annotated[
        str | None, typer.Option(help="A built-in template (chatml, llama3, ...) or a .jinja file, instead of its own.")
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="The last adapters of a run instead of the best.")] = False,
) -> None:
    """OpenAI's /v1/chat/completions, /v1/completions and /v1/models; the base and each adapter are the models.

    `POST /v1/adapters {"name": ..., "path": ...}` loads an adapter or a new version of one, from the run folder or a
    folder given with --adapters; `DELETE /v1/adapters/NAME` takes it away.
    """
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serving needs {' and '.join(missing)}: pip install lowrank[serve]")
    is_gguf = _check_engine(engine, model)
    if is_gguf and last:
        raise ConfigError(f"--last chooses among the adapters of a run, and {model} is a single model; leave it out")
    token = token or os.environ.get("LOWRANK_TOKEN") or None
    from lowrank.generate.generator import GeneratorConfig
    from lowrank.serve.app import new_token
    from lowrank.serve.limits import Limits
    from lowrank.serve.server import check_host, run

    check_host(host, token)
    for folder in adapters or ():
        if not folder.is_dir():
            raise OutputError(f"--adapters {folder}: no such folder")
    logging.basicConfig(level=logging.WARNING)
    limits = Limits(answers_at_once=at_once, waiting=max_waiting, request_seconds=timeout)
    if is_gguf:
        served = _open_gguf(model, adapters or [], chat_template, at_once, cache_tokens)
    elif engine == "vllm":
        served = _open_vllm(model, last, chat_template, adapters or [], resident, at_once)
    else:
        config = GeneratorConfig(max_rows=at_once, cache_tokens=cache_tokens)
        served = _open(model, last, chat_template, adapters or [], resident, config)
    generated = token is None
    token = token or new_token()

    def say(port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{port}/v1 answers as {_named([voice.name for voice in served.voices()])}", flush=True)
        if generated:
            print(f"API key: {token}", flush=True)

    run(served, host=host, port=port, token=token, hosts=allow_host or (), limits=limits, on_listening=say)


def _check_engine(engine: str, model: str) -> bool:
    """Whether llama.cpp answers. ConfigError for an engine that is not there, or that cannot read `model`."""
    is_gguf = model.endswith(".gguf")
    if engine not in ("auto", "torch", "vllm", "llama.cpp"):
        raise ConfigError(f"there is no engine {engine!r}; there are auto, torch, vllm and llama.cpp")
    if engine != "auto" and is_gguf != (engine == "llama.cpp"):
        reads = "GGUF files" if engine == "llama.cpp" else "folders and hub names"
        raise ConfigError(f"--engine {engine} reads {reads}, and {model} is none; leave --engine out")
    return is_gguf


def _open_gguf(model: str, adapters: list[Path], chat_template: str | None, at_once: int, cache_tokens: int) -> Engine:
    from lowrank.serve.gguf_engine import LlamaCppEngine

    found = {file.stem: file for folder in adapters for file in sorted(folder.glob("*.gguf"))}
    return LlamaCppEngine(
        Path(model), adapters=found, at_once=at_once, cache_tokens=cache_tokens, chat_template=chat_template
    )


def _open_vllm(
    model: str, last: bool, chat_template: str | None, adapters: list[Path], resident: int, at_once: int
) -> Engine:
    """The same paths as for torch, but the base is vLLM's."""
    from lowrank.checkpoints.peft_layout import load_adapter
    from lowrank.cli.warn import warn
    from lowrank.found import find
    from lowrank.models.depths import refuse
    from lowrank.models.loading import load_tokenizer
    from lowrank.planning.simulation import read_config
    from lowrank.serve.folders import adapters_in
    from lowrank.serve.refusal import Refusal
    from lowrank.serve.vllm_engine import VllmEngine, open_vllm
    from lowrank.serve.vllm_words import rank_for
    from lowrank.trained import renderers_of

    found = find(model, which="last" if last else "best", chat_template=chat_template, notify=lambda text: warn([text]))
    refuse(read_config(found.model), "vLLM has no such layers")
    if found.model.storage.type != "dense":
        warn([f"vLLM answers on the base in 16 bit; the adapters were trained on {found.model.storage.type}"])
    folders = {name: place for folder in adapters for name, place in adapters_in(folder).items()} | {**found.adapters}
    ranks = [rank for place in folders.values() for rank, _ in load_adapter(place).targets.values()]
    vllm = open_vllm(found.model, at_once=at_once, most_loras=resident, max_rank=rank_for(ranks))
    tokenizer = load_tokenizer(found.model)
    roots = [*([Path(model)] if found.adapters else []), *adapters]
    try:
        return VllmEngine(vllm, tokenizer, renderers_of(found, tokenizer), folders, roots=roots, at_once=at_once)
    except Refusal as refusal:
        raise ModelError(refusal.message) from refusal


def _open(
    model: str,
    last: bool,
    chat_template: str | None,
    adapters: list[Path],
    resident: int,
    config: GeneratorConfig,
) -> Engine:
    from lowrank.cli.warn import warn
    from lowrank.serve.bank_engine import BankEngine
    from lowrank.trained import open_trained

    which = "last" if last else "best"
    trained = open_trained(model, which=which, chat_template=chat_template, notify=lambda text: warn([text]))
    served = BankEngine(
        trained.base,
        trained.bank,
        trained.renderer,
        trained.slots,
        renderers=trained.renderers,
        folders=trained.folders,
        roots=[*([Path(model)] if trained.folders else []), *adapters],
        config=config,
        most_resident=resident,
    )
    for folder in adapters:
        served.shelf.register_all(folder)
    if served.generator.notice:
        warn([served.generator.notice])
    return served


def _named(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

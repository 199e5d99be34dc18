"""What makes the answers of a server: one file for each engine, found by its name.

A file of this folder has the name `ENGINE`, an `EngineKind`: what the engine reads, what stands against it, and how it
opens a path as a `ServeEngine` (serve/engine.py). `--engine` calls it by the file's name, with a dot for an
underscore. A third party's is `my_module:MY_ENGINE`. docs/add-an-engine.md
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank.checkpoints.adapter_folder import check_which
from lowrank.errors import ConfigError, ModelError, OutputError, did_you_mean, raise_all
from lowrank.notices import log_notice
from lowrank.third_party import load_code, names_code

if TYPE_CHECKING:
    from lowrank.serve.engine import ServeEngine

AUTO = "auto"
"""The first engine, in the order of their names, that reads the path and may be chosen without being named."""


@dataclass(frozen=True)
class ServingOptions:
    """How `open_engine` opens what is served."""

    engine: str = AUTO
    """One of `engine_names()`, a third party's `my_module:MY_ENGINE`, or `auto`."""
    adapters: Sequence[Path] = ()
    """Folders of adapters, or an adapter's own: each is served, and more may be loaded from there."""
    max_loras: int = 32
    """Adapters kept in memory; others come when asked for."""
    max_num_seqs: int = 64
    """Answers in progress at once."""
    kv_cache_tokens: int = 65536
    """Tokens of the KV cache."""
    chat_template: str | None = None
    """A built-in one or a .jinja file, instead of the model's own."""
    which: str = "best"
    """Of a run: its `best` or `last` adapters."""
    base: str | None = None
    """Where the base of the run or adapter is now."""
    compile: bool = False
    """Answer through compiled decoder layers (`GeneratorConfig.compile`)."""

    def __post_init__(self) -> None:
        check_which(self.which)


Notify = Callable[[str], None]
"""Called with what is left out, or done otherwise than requested."""


def _no_objections(path: str, options: ServingOptions) -> Sequence[str]:
    return ()


@dataclass(frozen=True)
class EngineKind:
    """What a file declares of its engine."""

    open: Callable[[str, ServingOptions, Notify], ServeEngine]
    """Load the model at a path. Raises ConfigError, ModelError."""
    reads: Callable[[str], bool]
    """Whether the engine can run what a path names; this loads and downloads nothing."""
    takes: str
    """Those kinds in words, for messages: `GGUF files`."""
    check: Callable[[str, ServingOptions], Sequence[str]] = field(default=_no_objections)
    """The problems of these options for a path that it reads, before anything is loaded."""
    packages: tuple[str, ...] = ()
    """Optional packages that the engine imports."""
    extra: str = ""
    """The extra of ours that brings these: `pip install 'lowrank-llm[serve,EXTRA]'`."""
    named_only: bool = False
    """`auto` never chooses it."""
    compiles: bool = False
    """It supports `ServingOptions.compile`."""

    @property
    def missing(self) -> list[str]:
        """Those of its packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def engine_names() -> list[str]:
    """The engines of this folder. Imports none of them."""
    return [module.name.replace("_", ".") for module in pkgutil.iter_modules(__path__)]


def engine_kind(name: str) -> EngineKind:
    """The engine of that name. ConfigError for an unknown one, with what there is."""
    if names_code(name):
        found: Any = load_code(name)
        if not isinstance(found, EngineKind):
            raise ConfigError(f"{name} is a {type(found).__name__}; expected a lowrank.serve.engines.EngineKind")
        return found
    names = engine_names()
    if name not in names:
        raise ConfigError(f"there is no engine {name!r}{did_you_mean(name, [AUTO, *names])}")
    return importlib.import_module(f"{__name__}.{name.replace('.', '_')}").ENGINE


def choose_engine(path: str, options: ServingOptions) -> EngineKind:
    """The engine that answers, chosen and checked before anything loads.

    ConfigError for one that is not there, that cannot read `path`, or that the options do not suit; ModelError where
    a package is missing; OutputError for a folder of adapters that is not there.
    """
    named = options.engine != AUTO
    kinds = {name: engine_kind(name) for name in ([options.engine] if named else engine_names())}
    if named and not kinds[options.engine].reads(path):
        takes = kinds[options.engine].takes
        raise ConfigError(f"--engine {options.engine} reads {takes}, and {path} is none; leave --engine out")
    name = next((name for name, kind in kinds.items() if kind.reads(path) and (named or not kind.named_only)), None)
    if name is None:
        takes = "; ".join(f"{name}: {kind.takes}" for name, kind in kinds.items())
        raise ConfigError(f"no engine reads {path} ({takes})")
    kind = kinds[name]
    problems = list(kind.check(path, options))
    if options.compile and not kind.compiles:
        able = ", ".join(each for each in engine_names() if engine_kind(each).compiles)
        problems.append(f"--compile is of the engine {able}; leave it out")
    raise_all(ConfigError, f"{path} cannot be served so by {name}", problems)
    if kind.missing:
        raise ModelError(f"--engine {name} needs {', '.join(kind.missing)}: {install(kind)}")
    for folder in options.adapters:
        if not folder.is_dir():
            raise OutputError(f"--adapters {folder}: no such folder")
    return kind


def open_engine(path: str, options: ServingOptions | None = None, notify: Notify = log_notice) -> ServeEngine:
    """Load what `path` names as an engine. Raises ConfigError, ModelError, OutputError."""
    options = options or ServingOptions()
    return choose_engine(path, options).open(path, options, notify)


def install(kind: EngineKind) -> str:
    """How what an engine needs is installed."""
    return f"pip install 'lowrank-llm[serve,{kind.extra}]'"

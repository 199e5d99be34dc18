"""What reward functions of Unsloth's notebooks call: answers that are Python functions, a time limit, environments.

None of this is a sandbox: code that a model wrote runs in this process, with little at hand and no more. The notebooks
ask for it by name.
"""

from __future__ import annotations

import ast
import builtins
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import CodeType, FunctionType
from typing import Any

from lowrank.errors import ConfigError

_HARMLESS = {"math", "cmath", "random", "itertools", "functools", "collections", "heapq", "bisect", "statistics",
             "string", "re", "copy", "operator", "fractions", "decimal", "typing", "time", "json", "array",
             "dataclasses", "enum", "numbers"}  # fmt: skip
"""What a locked-down function may import."""
_WITHHELD = {"open", "exec", "eval", "compile", "input", "breakpoint", "exit", "quit", "help", "globals", "locals",
             "vars", "memoryview", "setattr", "delattr", "getattr"}  # fmt: skip
_WAIT_S, _TRIALS = 60.0, 30


def check_python_modules(code: str) -> tuple[bool, dict[str, Any]]:
    """Whether code imports the standard library alone, and what it imports: `stdlib`, `non_stdlib`,
    `relative_imports`; `error` where it is no Python."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return False, {"error": f"SyntaxError: {error}", "stdlib": [], "non_stdlib": [], "relative_imports": 0}
    found, relative = set(), 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {each.name.partition(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            relative += 1
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    known = found & set(sys.stdlib_module_names)
    return not found - known, {
        "stdlib": sorted(known), "non_stdlib": sorted(found - known), "relative_imports": relative,
    }  # fmt: skip


def create_locked_down_function(function: str) -> Callable[..., Any]:
    """The one function that the text defines, which sees no global names, no files and few modules.

    ConfigError, SyntaxError: the text is not one plain function.
    """
    tree = ast.parse(function)
    body = [each for each in tree.body if not isinstance(each, (ast.Import, ast.ImportFrom))]
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef) or body[0].decorator_list:
        raise ConfigError("create_locked_down_function: expected the text of one function without decorators")
    hidden = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")]
    hidden += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id.startswith("__")]
    if hidden:
        raise ConfigError(f"create_locked_down_function: names of Python's own machinery: {', '.join(sorted(hidden))}")
    defined = body[0]
    defined.returns = None
    for each in (*defined.args.args, *defined.args.posonlyargs, *defined.args.kwonlyargs):
        each.annotation = None
    for each in (defined.args.vararg, defined.args.kwarg):
        if each is not None:
            each.annotation = None
    given = [*defined.args.defaults, *(each for each in defined.args.kw_defaults if each is not None)]
    if not all(_is_literal(each) for each in given):
        raise ConfigError("create_locked_down_function: a default value is no literal")
    code = compile(ast.Module([defined], []), "<answer>", "exec")
    inner = next(each for each in code.co_consts if isinstance(each, CodeType) and each.co_name == defined.name)
    defaults = tuple(ast.literal_eval(each) for each in defined.args.defaults)
    made = FunctionType(inner, {"__builtins__": _few_builtins()}, defined.name, defaults or None)
    made.__kwdefaults__ = {
        each.arg: ast.literal_eval(value)
        for each, value in zip(defined.args.kwonlyargs, defined.args.kw_defaults)
        if value is not None
    }
    return made


def _is_literal(node: ast.AST) -> bool:
    try:
        ast.literal_eval(node)  # type: ignore[arg-type]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _few_builtins() -> dict[str, Any]:
    few = {name: value for name, value in vars(builtins).items() if name[0] != "_" and name not in _WITHHELD}
    few["__build_class__"] = builtins.__build_class__

    def harmless(name: str, *others: Any) -> Any:
        if name.partition(".")[0] not in _HARMLESS:
            raise ImportError(f"{name}: not for a locked-down function")
        return builtins.__import__(name, *others)

    few["__import__"] = harmless
    return few


def execute_with_time_limit(seconds: float, **others: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: TimeoutError after so many seconds. Unix, and the main thread alone; there an interval timer
    interrupts, elsewhere the time is checked when the function returns."""
    if seconds <= 0:
        raise ConfigError(f"execute_with_time_limit({seconds}): expected more than 0 seconds")
    if others.get("backend", "signal") not in ("signal", "auto"):
        raise ConfigError(f"backend={others['backend']!r}: only signal; a function that is never interrupted stays")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            with _time_limit(seconds):
                return function(*args, **kwargs)

        return limited

    return decorate


@contextmanager
def _time_limit(seconds: float) -> Generator[None, None, None]:
    started = time.monotonic()

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    can_interrupt = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not can_interrupt:
        yield
    else:
        handler = signal.signal(signal.SIGALRM, late)
        before = signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if before[0]:
                signal.setitimer(signal.ITIMER_REAL, max(before[0] - (time.monotonic() - started), 1e-3), before[1])
    if time.monotonic() - started > seconds + 0.05:
        raise TimeoutError(f"took more than {seconds:g} s")


def is_port_open(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex((host, port)) == 0


def launch_openenv(
    port: int = 8111,
    openenv_process: Any = None,
    working_directory: str | None = None,
    server: str = "envs.openspiel_env.server.app:app",
    environment: Mapping[str, str] | None = None,
    openenv_class: Any = None,
) -> tuple[int, Any]:
    """(port, client) of a running OpenEnv server: that of `openenv_process` while it is healthy, else a new one.

    The server is a program of `working_directory`, started by uvicorn for this machine alone.
    """
    if openenv_process is not None and _is_healthy(port):
        return port, openenv_process
    if working_directory is None or openenv_class is None:
        raise ConfigError("launch_openenv: give working_directory and openenv_class")
    own = {**os.environ, **(environment or {})}
    program = [sys.executable, "-m", "uvicorn", server, "--host", "127.0.0.1"]
    for _ in range(_TRIALS):
        port = random.SystemRandom().randrange(9000, 65535)
        started = subprocess.Popen([*program, "--port", str(port)], env=own, cwd=working_directory,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        end = time.monotonic() + _WAIT_S
        while started.poll() is None and time.monotonic() < end:
            if is_port_open("127.0.0.1", port) and _is_healthy(port):
                return port, openenv_class(base_url=f"http://localhost:{port}")
            time.sleep(0.05)
        started.kill()
        started.wait()
    raise ConfigError(f"launch_openenv: no server came up in {_TRIALS} trials; try `{' '.join(program)}` by hand")


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=1) as answer:
            return b"healthy" in answer.read(10_000)
    except OSError:
        return False

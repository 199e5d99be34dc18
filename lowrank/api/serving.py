"""`lowrank.serve`: the OpenAI-compatible server in a thread of this process, for notebooks and tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from lowrank.api.keywords import known_keywords
from lowrank.errors import ModelError
from lowrank.notices import log_notice
from lowrank.serve.address import check_host, check_installed, listen, url_of
from lowrank.serve.engines import AUTO, ServingOptions, open_engine
from lowrank.third_party import code_allowed


class RunningServer:
    """A server that answers until `close`, or until its `with` ends.

    url      `http://127.0.0.1:8000/v1`, the base URL for OpenAI clients
    token    what clients send as their API key
    models   names that may be asked: the base and each adapter
    """

    def __init__(self, server: Any, socket: Any, url: str, token: str, models: Sequence[str]) -> None:
        self.url, self.token, self.models = url, token, list(models)
        self._server, self._socket = server, socket
        self._thread = threading.Thread(target=self._run, name="lowrank-serve", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def await_start(self) -> None:
        """Until it answers. ModelError if it ended before."""
        while not self._server.started:
            if not self._thread.is_alive():
                raise ModelError("the server ended before it began to answer; its log says why")
            time.sleep(0.01)

    def wait(self) -> None:
        """Until it is closed, or an interrupt comes."""
        self._thread.join()

    def close(self) -> None:
        """Answers in progress end; the port and the engine are given back."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RunningServer({self.url!r}, models={self.models})"


@known_keywords
def serve(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    engine: str = AUTO,
    adapters: Sequence[str | Path] = (),
    which: Literal["best", "last"] = "best",
    chat_template: str | None = None,
    base: str | None = None,
    max_loras: int = 32,
    max_num_seqs: int = 64,
    kv_cache_tokens: int = 65536,
    compile: bool = False,
    notify: Callable[[str], None] = log_notice,
    allow_code: bool = False,
) -> RunningServer:
    """Answer OpenAI clients with what `path` names, as `lowrank serve` does, from a thread of this process.

        with lowrank.serve("runs/a") as server:
            client = openai.OpenAI(base_url=server.url, api_key=server.token)

    port       0 takes a free one
    engine     a file of lowrank/serve/engines (`torch`, `vllm`, `llama.cpp`), or `my_module:MY_ENGINE`; `auto` takes
               the one that reads the path
    token      the API key; left out: a new one, `RunningServer.token`. Needed for a host that others can reach
    adapters   folders of adapter folders, or an adapter's own: each is served, and more may be loaded from there
    max_loras  adapters kept in memory; `max_num_seqs` answers in progress; `kv_cache_tokens` tokens of the KV cache
    compile    answer through decoder layers compiled by torch: the first steps take up to a minute

    Needs `pip install 'lowrank-llm[serve]'`. Raises ConfigError, ModelError, OutputError.
    """
    check_installed("serving", "serve")
    from lowrank.serve.api.app import new_token
    from lowrank.serve.limits import RequestLimits
    from lowrank.serve.server import make_server

    folders = tuple(Path(each) for each in adapters)
    options = ServingOptions(
        engine, folders, max_loras, max_num_seqs, kv_cache_tokens, chat_template, which, base, compile
    )
    check_host(host, token)
    with code_allowed(allow_code):
        served = open_engine(str(path), options, notify)
    socket, key = listen(host, port), token or new_token()
    names = {host} - {"0.0.0.0", "::"}
    server = make_server(served, token=key, hosts=names, limits=RequestLimits(max_num_seqs=max_num_seqs))
    url = f"{url_of(host, socket.getsockname()[1])}/v1"
    running = RunningServer(server, socket, url, key, [each.name for each in served.served_models()])
    running.await_start()
    return running

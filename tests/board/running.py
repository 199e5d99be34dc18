"""A board on a free loopback port, in a thread of the test or as a process that can be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lowrank.board.places import Places
from lowrank.board.serve import make_server
from lowrank.board.state import Board, Options
from lowrank.serve.address import listen

TOKEN = "a-token-of-the-tests"


@dataclass
class Running:
    """A board that answers."""

    board: Board
    port: int

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """One that has been let in and sends what our own page would."""
        headers = {"Origin": self.url}
        with httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False) as client:
            assert client.get("/", params={"token": TOKEN}).status_code == 200
            yield client


@contextmanager
def board_on(folder: Path, *, options: Options | None = None, **places: Any) -> Iterator[Running]:
    """A board in this process; what it started is ended after it."""
    board = Board(Places(folder, **places), options)
    socket = listen("127.0.0.1", 0)
    port = socket.getsockname()[1]
    server = make_server(board, token=TOKEN, hosts=(), port=port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Running(board, port)
    finally:
        server.should_exit = True
        thread.join(30)
        socket.close()
        end_children(board)


def end_children(board: Board) -> None:
    """Nothing of a test goes on after it."""
    for process in board.queue._children.values():
        process.kill()
        process.wait()
    for task in board.queue.running():
        child = board.queue.tasks.child(task)
        if child is not None and child.lives:
            os.kill(child.pid, signal.SIGKILL)


@dataclass
class Program:
    """`lowrank board` as a process."""

    process: subprocess.Popen[str]
    address: str

    def kill(self) -> None:
        """As the machine would."""
        self.process.kill()
        self.process.communicate()


def start_program(folder: Path, port: int = 0) -> Program:
    """Start it and wait until it says where it is."""
    arguments = [sys.executable, "-m", "lowrank", "board", str(folder), "--port", str(port), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    return Program(process, json.loads(process.stdout.readline())["url"])

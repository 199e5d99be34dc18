"""`lowrank serve` as a program: what it prints, what it refuses, how it stops."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest

from lowrank.cli.main import main


def test_it_serves_until_it_is_told_to_stop() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LOWRANK_TOKEN"}
    arguments = [sys.executable, "-m", "lowrank", "serve", "lowrank/tiny", "--port", "0"]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            where = re.match(r"(http://127\.0\.0\.1:\d+/v1) answers as base\n", process.stdout.readline())
            key = re.match(r"API key: (\S{32})\n", process.stdout.readline())
            assert where is not None
            assert key is not None
            headers = {"Authorization": f"Bearer {key[1]}"}
            with httpx.Client(base_url=where[1], headers=headers, timeout=60) as http:
                reply = http.post("/completions", json={"model": "base", "prompt": "The sky", "max_tokens": 4})
                assert reply.json()["usage"]["completion_tokens"] <= 4
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert process.stderr is not None
            assert process.stderr.read().endswith("interrupted: it no longer serves\n")
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--host", "0.0.0.0"], "LOWRANK_TOKEN", 2),
        (["--engine", "magic"], "there is no engine 'magic'", 2),
        (["--engine", "vllm"], "needs vllm: pip install", 4),
        (["--engine", "llama.cpp"], "reads GGUF files", 2),
        (["--adapters", "nowhere"], "no such folder", 5),
        (["--resident", "4"], "--resident is called '--max-loras' now", 2),
        (["--at-once=4", "--cache-tokens", "512"], "--at-once is called '--max-num-seqs' now", 2),
        (["--at-once=4", "--cache-tokens", "512"], "--cache-tokens is called '--kv-cache-tokens' now", 2),
    ],
)
def test_refusals(
    arguments: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOWRANK_TOKEN", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(["serve", "lowrank/tiny", *arguments])
    assert caught.value.code == code
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("lowrank.cli.main.LazyGroup.list_commands", lambda self, ctx: ["serve"])
    with pytest.raises(SystemExit) as caught:
        main(["serve", "lowrank/tiny"])
    assert caught.value.code == 2
    assert "pip install 'lowrank-llm[serve]'" in capsys.readouterr().err

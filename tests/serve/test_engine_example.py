"""The engine of docs/add-an-engine.md as it stands there, served."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from lowrank.errors import ConfigError
from lowrank.serve.engine import ServeEngine
from lowrank.serve.engines import ServingOptions, choose_engine, open_engine
from tests.serve.running import TOKEN, http_serving
from tests.serve.test_engine_contract import post, streamed

PAGE = Path(__file__).parents[2] / "docs" / "add-an-engine.md"
NAME = "my_engine:ENGINE"


@pytest.mark.usefixtures("allowed_code")
def test_the_example_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (tmp_path / "my_engine.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_engine", raising=False)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=f"--engine {NAME} reads folders"):
        choose_engine(str(tmp_path / "x.gguf"), ServingOptions(NAME))
    engine = open_engine("lowrank/tiny", ServingOptions(NAME, max_num_seqs=2))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    services: list[Any] = []
    with (
        http_serving(engine, services=services) as url,
        httpx.Client(base_url=url, headers=headers, timeout=60) as http,
    ):
        assert [each["id"] for each in http.get("/v1/models").json()["data"]] == ["base"]
        reply = post(http, max_tokens=400).json()
        (choice,) = reply["choices"]
        assert "What is the capital of France?" in choice["message"]["content"]
        assert (choice["finish_reason"], reply["usage"]["completion_tokens"]) == (
            "stop",
            reply["usage"]["prompt_tokens"],
        )
        assert "".join(streamed(http, model="base", max_tokens=400)) == choice["message"]["content"]
        assert [each["finish_reason"] for each in post(http, n=2, max_tokens=3, temperature=1).json()["choices"]] == [
            "length", "length",
        ]  # fmt: skip
        assert "there is no model 'nobody' here; there are base" in post(http, model="nobody").text
        long = post(http, messages=[{"role": "user", "content": "word " * 3000}])
        assert "tokens and the model's maximum context length is 1024" in long.text
        assert http.post("/v1/adapters", json={"name": "x", "path": "x"}).status_code == 400
        assert http.post("/v1/embeddings", json={"model": "base", "input": "x"}).status_code == 400
        for _ in range(100):
            if not engine.load().running and not services[0].limiter.taken:
                break
            time.sleep(0.02)
        assert engine.load().running == 0
    assert not engine.alive


def test_the_page_names_every_member() -> None:
    text = PAGE.read_text("utf-8")
    own = [name for name in (*vars(ServeEngine), *ServeEngine.__annotations__) if not name.startswith("_")]
    assert len(own) >= 14
    assert [name for name in own if not re.search(rf"`{name}\b", text)] == []

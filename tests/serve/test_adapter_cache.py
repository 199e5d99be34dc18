"""Adapters loaded, replaced and taken away while the server answers; more registered than resident."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lowrank.generate.request import GenerationConfig
from lowrank.records import Conversation, Message
from tests.serve.running import Running, open_world, random_adapter, save, serving

QUESTION = "Tell me about the sea and about everything that lives in it, in many words."
MANY = 12


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Adapters a0, a1, ... in folders, and what each of them says."""
    folder = tmp_path_factory.mktemp("adapters")
    world = open_world()
    names = [f"a{number}" for number in range(MANY)]
    for number, name in enumerate(names):
        save(world, random_adapter(world, name, 10 + number), folder / name)
    conversation = Conversation((Message("user", QUESTION),))
    described = world.answer([(name, conversation) for name in names], GenerationConfig(max_new_tokens=12))
    return folder, dict(zip(names, described))


@pytest.fixture
def server(shelf: tuple[Path, dict[str, str]], tmp_path: Path) -> Iterator[Running]:
    shutil.copytree(shelf[0], tmp_path / "allowed")
    with serving(open_world(), roots=[tmp_path / "allowed"], max_loras=3) as running:
        yield running


def answer_of(server: Running, name: str) -> str:
    reply = server.client().chat.completions.create(
        model=name, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=12
    )
    return reply.choices[0].message.content or ""


def test_publish_replace_and_withdraw_while_it_answers(server: Running, shelf: tuple[Path, dict[str, str]]) -> None:
    described = shelf[1]
    http = server.http()
    reply = http.post("/v1/adapters", json={"name": "pet", "path": "a0"})
    assert (reply.status_code, reply.json()["version"], reply.json()["parent"]) == (200, 1, "base")
    assert answer_of(server, "pet") == described["a0"]
    wrong: list[str] = []
    stop = threading.Event()

    def keep_requesting() -> None:
        while not stop.is_set():
            answer = answer_of(server, "pet")
            if answer not in (described["a0"], described["a1"]):
                wrong.append(answer)

    with ThreadPoolExecutor(4) as pool:
        requesting = [pool.submit(keep_requesting) for _ in range(4)]
        for version in range(2, 8):
            path = f"a{(version + 1) % 2}"
            assert http.post("/v1/adapters", json={"name": "pet", "path": path}).json()["version"] == version
            assert answer_of(server, "pet") == described[path], "keys of the version before were read"
        stop.set()
        for each in requesting:
            each.result()
    assert wrong == []
    assert http.delete("/v1/adapters/pet").json() == {"id": "pet", "object": "model", "deleted": True}
    assert http.delete("/v1/adapters/pet").status_code == 404
    assert http.delete("/v1/adapters/base").status_code == 400
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["base", "one", "two"]
    assert server.settles()
    assert len(server.engine.generator.bank.slots) == 2, "one and two; every version of the pet is gone"


def test_a_folder_that_is_trained_on_is_read_anew(server: Running, shelf: tuple[Path, dict[str, str]]) -> None:
    folder = server.engine.cache.roots[0]
    shutil.copytree(shelf[0] / "a2", folder / "run" / "job" / "best")
    http = server.http()
    assert http.post("/v1/adapters", json={"name": "job", "path": "run/job"}).status_code == 200
    assert answer_of(server, "job") == shelf[1]["a2"]
    shutil.rmtree(folder / "run" / "job" / "best")
    shutil.copytree(shelf[0] / "a3", folder / "run" / "job" / ".best.replaced")  # in the middle of a replacement
    assert http.post("/v1/adapters", json={"name": "job", "path": str(folder / "run" / "job")}).status_code == 200
    assert answer_of(server, "job") == shelf[1]["a3"]


def test_a_thousand_registered_and_three_resident(server: Running, shelf: tuple[Path, dict[str, str]]) -> None:
    folder, described = server.engine.cache.roots[0], dict(shelf[1])
    for number in range(MANY, 1000):  # links: the same files under other names
        (folder / f"b{number}").mkdir()
        for file in (folder / f"a{number % MANY}").iterdir():
            os.link(file, folder / f"b{number}" / file.name)
        described[f"b{number}"] = described[f"a{number % MANY}"]
    assert server.engine.cache.register_all(folder) == sorted(described)
    assert server.engine.cache.register_all(folder) == []
    names = [*list(described)[::97], *list(described)[:5], "a0", "b500", "a0", "a1"]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda name: answer_of(server, name), names)) == [described[name] for name in names]
    assert answer_of(server, "b999") == described["b999"]
    assert server.settles()
    models = {model["id"]: model for model in server.http().get("/v1/models").json()["data"]}
    resident = [name for name, model in models.items() if model.get("resident")]
    assert len(models) == 3 + 1000
    assert len(resident) == 3
    assert "b999" in resident, "it was asked for last"
    assert len(server.engine.generator.bank.slots) == 2 + 3
    reply = server.http().post("/v1/completions", json={"model": "b1000", "prompt": "x"})
    assert "did you mean" in reply.json()["error"]["message"]
    assert len(reply.text) < 1000


@pytest.mark.parametrize(
    "path", ["/etc", "../outside", "..", "a0/../../outside", "link", "a0\0", "/", "~", "a0/../../allowed-too/x"]
)
def test_nothing_outside_the_folders_is_read(server: Running, path: str, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "allowed" / "a0", tmp_path / "outside")
    shutil.copytree(tmp_path / "allowed" / "a0", tmp_path / "allowed-too" / "x")
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "allowed" / "job").mkdir()
    (tmp_path / "allowed" / "job" / "best").symlink_to(tmp_path / "outside")
    for tried in (path, "job"):
        reply = server.http().post("/v1/adapters", json={"name": "x", "path": tried})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "path"
    assert "x" not in server.engine.cache.names


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"name": "base", "path": "a0"}, "cannot be replaced"),
        ({"name": "x", "path": "broken"}, "cannot be read"),
        ({"name": "x"}, "path"),
        ({"name": "../x y", "path": "a0"}, "name"),
        ({"name": "x", "path": "a0", "trust": True}, "unsupported option: trust"),
    ],
)
def test_what_cannot_be_loaded_changes_nothing(server: Running, body: dict[str, Any], message: str) -> None:
    folder = server.engine.cache.roots[0]
    shutil.copytree(folder / "a0", folder / "broken")
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"no tensors")
    before = server.engine.cache.names
    reply = server.http().post("/v1/adapters", json=body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]
    assert server.engine.cache.names == before

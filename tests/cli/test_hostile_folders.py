"""Folders of strangers, through the command line: one sentence that names the file, soon, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lowrank.adapters import patterns
from lowrank.adapters.targets import by_pattern
from lowrank.errors import ModelError
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca
from tests.command_line import lowrank

SECONDS = 20
"""For one command on a machine that does others too; each takes one or two."""
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


def set_config(**changes: Any) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return mutate


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return mutate


def pipe(name: str) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return mutate


def loop(name: str) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(name)

    return mutate


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


def index(name: str) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))

    return mutate


def flipped(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[9:40] = bytes(255 - each for each in content[9:40])
    path.write_bytes(content)


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "deep config": (write("config.json", DEEP), "config.json: cannot be read as JSON"),
    "config is a list": (write("config.json", "[]"), "config.json: expected a JSON object"),
    "config is binary": (write("config.json", b"\xff\xfe\x00{"), "config.json: cannot be read as UTF-8"),
    "config is a pipe": (pipe("config.json"), "config.json: a pipe"),
    "config is a loop": (loop("config.json"), "config.json: cannot be read"),
    "tokenizer is a pipe": (pipe("tokenizer.json"), "tokenizer.json: a pipe"),
    "deep tokenizer": (write("tokenizer.json", DEEP), "tokenizer"),
    "weights are a pipe": (pipe("model.safetensors"), "model.safetensors: a pipe"),
    "zero heads": (set_config(num_attention_heads=0), "num_attention_heads: 0; expected 1"),
    "negative hidden size": (set_config(hidden_size=-32), "hidden_size: -32"),
    "ten million layers": (set_config(num_hidden_layers=10**7), "num_hidden_layers: 10000000"),
    "huge vocabulary": (set_config(vocab_size=2**31), "vocab_size: 2147483648"),
    "text for a number": (set_config(hidden_size="32"), "hidden_size: '32' is no whole number"),
    "NaN for a number": (set_config(intermediate_size=float("nan")), "intermediate_size: 'nan'"),
    "heads that do not divide": (set_config(num_key_value_heads=3), "3 do not divide 4"),
    "a model larger than its files": (set_config(vocab_size=2**23), "they are not of one model"),
    "index out of the folder": (index("../../etc/passwd"), "leads out of the folder"),
    "index with an absolute path": (index("/etc/passwd"), "leads out of the folder"),
    "flipped header": (flipped, "model.safetensors"),
    "empty weights": (write("model.safetensors", b""), "no safetensors header"),
    "header of 2^63 bytes": (write("model.safetensors", struct.pack("<Q", 1 << 63)), "no safetensors header"),
    "deep header": (
        write("model.safetensors", struct.pack("<Q", len(DEEP)) + DEEP.encode()),
        "model.safetensors: the header",
    ),
    "negative shape": (
        write("model.safetensors", header(a={**ENTRY, "shape": [-2, -2]})),
        "a: shape [-2, -2]",
    ),
    "overlapping tensors": (
        write("model.safetensors", header(a=ENTRY, b={**ENTRY, "data_offsets": [8, 24]})),
        "b lies on the bytes of a",
    ),
    "overflowing shape": (
        write("model.safetensors", header(a={**ENTRY, "shape": [1 << 40, 1 << 40]})),
        "model.safetensors: a has 16 bytes",
    ),
    "offsets beyond the end": (
        write("model.safetensors", header(a={**ENTRY, "shape": [4000], "data_offsets": [0, 16000]})),
        "model.safetensors: it ends at byte",
    ),
}
OF_WEIGHTS = {
    name
    for name, (_, described) in MODELS.items()
    if "safetensors" in described or "lies" in described or "shape [" in described
}
OF_WEIGHTS |= {"a model larger than its files", "empty weights", "header of 2^63 bytes"}
OF_WEIGHTS |= {"index out of the folder", "index with an absolute path"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_checkpoint_folder(folder / "model")
    write_alpaca(folder / "train.json", 6)
    lowrank("--version")  # what it imports once is no command's time
    return folder


def commands(world: Path, model: Path, out: Path) -> dict[str, tuple[str, ...]]:
    settings = out / "run.json"
    content = {
        "model": {"path": str(model), "device": "cpu", "dtype": "float32"},
        "data": {"train": [str(world / "train.json")]},
        "output_dir": str(out / "run"),
        "max_steps": 1,
    }
    settings.write_text(json.dumps(content))
    return {
        "chat": ("chat", str(model), "--prompt", "hello"),
        "plan": ("plan", str(settings)),
        "train": ("train", str(settings)),
        "export": ("export", str(model), "--to", "merged", "--output", str(out / "exported")),
    }


def assert_refused(arguments: tuple[str, ...], described: str, codes: tuple[int, ...] = (2, 3, 4, 5)) -> None:
    begin = time.monotonic()
    done = lowrank(*arguments)
    took = time.monotonic() - begin
    output = done.stdout + done.stderr
    assert "Traceback" not in output, output[-3000:]
    assert done.returncode in codes, output[-2000:]
    assert described in " ".join(output.split()), output[-2000:]
    assert len(output) < 4000
    assert took < SECONDS


@pytest.mark.parametrize("which", ["chat", pytest.param("others", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", MODELS)
def test_model_folders(case: str, which: str, world: Path, tmp_path: Path) -> None:
    mutate, described = MODELS[case]
    shutil.copytree(world / "model", tmp_path / "model")
    mutate(tmp_path / "model")
    arguments = commands(world, tmp_path / "model", tmp_path)
    others = ("train",) if case in OF_WEIGHTS else ("plan", "train")
    for name in ("chat",) if which == "chat" else others:
        assert_refused(arguments[name], described)
    shutil.rmtree(tmp_path / "model")


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "rank as text": ({"r": "8"}, "r: '8'; expected a whole number above 0"),
    "rank of a billion": ({"r": 10**9}, "r: '1000000000'"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "lora_alpha: 'inf'"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha: 'nan'"),
    "pattern of text": ({"rank_pattern": "q_proj"}, "rank_pattern: 'q_proj'; expected {name or regular"),
    "pattern that is none": ({"alpha_pattern": {"(": 4}}, "'(' is no regular expression"),
    "NaN in a pattern": ({"alpha_pattern": {"q_proj": float("nan")}}, "'q_proj' has 'nan'"),
    "names that are none": ({"modules_to_save": "lm_head"}, "modules_to_save: 'lm_head'; expected a list of names"),
    "base with NUL": ({"base_model_name_or_path": "a\0b"}, "base_model_name_or_path"),
    "base over-long": ({"base_model_name_or_path": "a/" * 5000}, "base_model_name_or_path"),
    "base is a number": ({"base_model_name_or_path": 3}, "base_model_name_or_path: '3' is no name"),
}


@pytest.fixture(scope="module")
def adapter(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of PEFT's layout, on the base of `world`."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    folder.mkdir()
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(world / "model"), "r": 8,
        "lora_alpha": 16, "target_modules": ["q_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.zeros(8, 32), f"{name}.lora_B.weight": torch.zeros(32, 8)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapter_folders(case: str, adapter: Path, tmp_path: Path) -> None:
    changes, described = ADAPTERS[case]
    shutil.copytree(adapter, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert_refused(("chat", str(tmp_path / "a"), "--prompt", "hello"), described)


@pytest.mark.parametrize(
    ("mutate", "described"),
    [
        (write("adapter_config.json", DEEP), "adapter_config.json: cannot be read as JSON"),
        (pipe("adapter_model.safetensors"), "adapter_model.safetensors: a pipe"),
        (pipe("adapter_config.json"), "has no config.json, so it is no model's folder"),
        (write("adapter_model.safetensors", header(a={**ENTRY, "shape": [-4]})), "adapter_model.safetensors"),
    ],
    ids=["deep", "pipe", "config is a pipe", "negative"],
)
def test_adapter_files(mutate: Callable[[Path], None], described: str, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    mutate(tmp_path / "a")
    assert_refused(("chat", str(tmp_path / "a"), "--prompt", "hello"), described)


def test_exports_do_not_follow_links_out_of_the_base(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "secret").write_text("the content of a private file")
    (tmp_path / "model" / "notes.txt").symlink_to(tmp_path / "secret")
    export = commands(world, tmp_path / "model", tmp_path)["export"]
    assert_refused(export, "notes.txt: links that lead out of this folder")
    assert not list((tmp_path).glob("exported/**/notes.txt"))


def test_links_of_the_hubs_cache_are_no_links_out(tmp_path: Path) -> None:
    from lowrank.foreign_files import leads_out

    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "blobs" / "1").write_text("{}")
    link = tmp_path / "snapshots" / "abc" / "tokenizer.json"
    link.symlink_to(Path("../../blobs/1"))
    assert not leads_out(link, link.parent)
    (tmp_path / "elsewhere").write_text("")
    other = tmp_path / "snapshots" / "abc" / "other"
    other.symlink_to(tmp_path / "elsewhere")
    assert leads_out(other, other.parent)


def test_patterns_have_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """`re` takes years for both; `regex` sees through the first by itself and needs the limit for the second."""
    name = "model.layers.10.self_attn.some_very_long_projection_name"
    begin = time.process_time()
    assert by_pattern({r"(?:(?:[a-z_.0-9]+)*)*(?:(?:[a-z_.0-9]+)*)*\d[A-Z]": 4}, name, 8) == 8
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    with pytest.raises(ModelError, match=r"takes more than 0.2 s for 'model.layers.10.*write a list of names instead"):
        by_pattern({r"(\w|\.|\w\w|_)*[A-Z]": 4}, name, 8)
    assert time.process_time() - begin < 2
    assert by_pattern({"projection_name": 4}, name, 8) == 8
    assert by_pattern({r"layers\.1\d\..*_name": 4}, name, 8) == 4


@pytest.mark.parametrize("command", [pytest.param("serve", marks=pytest.mark.slow), "show", "chat"])
def test_paths_that_are_too_long(command: str) -> None:
    assert_refused((command, "a" * 400, *(("--prompt", "x") if command == "chat" else ())), "File name too long")

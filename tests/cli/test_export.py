"""`lowrank export` as typed, and uploads to a hub that stands in the test."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from lowrank.adapters.variants import lora
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import save_adapter
from lowrank.cli.export_settings import read_combination, read_targets
from lowrank.cli.export_view import show
from lowrank.cli.main import main
from lowrank.errors import ConfigError, ModelError, OutputError
from lowrank.export.targets import gguf as targets_gguf
from lowrank.terminal import Console
from tests.checkpoint_folder import save_checkpoint_folder
from tests.checkpoints.test_peft_layout import random_adapter
from tests.export.sources import load
from tests.hub_stand_in import hub_stand_in


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    model = load(save_checkpoint_folder(world / "model"), torch.float32)
    save_adapter(
        world / "mine", random_adapter(model, lora.LoraConfig(rank=2)), describe_base(model, str(world / "model"))
    )
    return world / "mine"


def call(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def test_export_prints_and_leaves_by_its_exit_code(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("export", adapter, "--to", "merged", "-o", tmp_path / "out", "max_shard_size=30KB") == 0
    shown = capsys.readouterr().out
    assert "it is the same model" in shown
    assert "general questions" in shown
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1

    from lowrank.export.targets import merged

    strict = {dtype: type(allowed)(0.0, 1.0, 0.0) for dtype, allowed in merged.TOLERANCES.items()}
    monkeypatch.setattr(merged, "TOLERANCES", strict)
    arguments = ("export", adapter, "--dtype", "float16", "-o", tmp_path / "half")
    assert call(*arguments) == 6
    output = capsys.readouterr()
    assert "differs" in output.out
    assert "by more than it may" in output.err
    assert call(*arguments[:-1], tmp_path / "json", "--json") == 6
    result = json.loads(capsys.readouterr().out)
    assert result["targets"]["merged"]["passed"] is False


def _full(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_target_that_fails_keeps_no_other_from_being_written(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fails before anything is written, one while it is, and the one named last is written and compared."""
    monkeypatch.setattr("lowrank.export.targets.merged.write_shards", _full)
    for out in ("text", "json"):
        (tmp_path / out / "gguf").mkdir(parents=True)
        (tmp_path / out / "gguf" / "mine.txt").touch()
    arguments = ("export", adapter, "--to", "gguf,merged,peft", "-o")
    assert call(*arguments, tmp_path / "text", "--no-verify") == 5
    output = capsys.readouterr()
    assert "gguf is not empty" in output.err
    assert "merged failed: " in output.err
    assert "the disk became full while merged was written" in output.err
    assert "peft failed" not in output.err
    assert call(*arguments, tmp_path / "json", "--json") == 5
    result = json.loads(capsys.readouterr().out)
    assert [*result["targets"]] == ["gguf", "merged", "peft"]
    assert result["passed"] is False
    assert result["targets"]["peft"]["passed"] is True
    for name, reason in (("gguf", "is not empty"), ("merged", "the disk became full")):
        error = result["targets"][name]["error"]
        assert (error["type"], error["exit_code"]) == ("OutputError", 5)
        assert reason in error["message"]
    for out in ("text", "json"):
        assert sorted(path.name for path in (tmp_path / out).iterdir()) == ["gguf", "peft"]
        assert (tmp_path / out / "peft" / "adapter_model.safetensors").is_file()
        written = json.loads((tmp_path / out / "peft" / "export.json").read_text())
        assert written["passed"] is (True if out == "json" else None)
    (tmp_path / "json" / "peft" / "export.json").unlink()
    assert call(*arguments, tmp_path / "json", "--json") == 5, "all of them fail"
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert [name for name in ("gguf: ", "merged: ", "peft: ") if name not in message] == []


def test_a_type_that_fails_keeps_no_other_from_being_written(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of GGUF files: one that cannot be quantized, one that llama.cpp does not read."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    quantize, read = targets_gguf.quantize_file, targets_gguf.LlamaReader.__init__

    def fails(origin: Path, target: Path, name: str, **options: Any) -> Any:
        if name == "q5_0":
            target.write_bytes(b"half of it")
            raise ModelError("no kernel for q5_0")
        return quantize(origin, target, name, **options)

    def refuses(self: Any, path: Path, *arguments: Any) -> None:
        if "Q4_0" in path.name:
            raise ModelError(f"{path.name}: llama.cpp cannot read it")
        read(self, path, *arguments)

    monkeypatch.setattr(targets_gguf, "quantize_file", fails)
    monkeypatch.setattr(targets_gguf.LlamaReader, "__init__", refuses)
    arguments = ("export", adapter, "--to", "gguf", "--type", "f16,q5_0,q4_0", "-o", tmp_path / "out")
    assert call(*arguments) == ModelError.exit_code
    output = capsys.readouterr()
    assert "gguf, q5_0 failed: no kernel for q5_0" in output.err
    assert "Q4_0.gguf: llama.cpp cannot read it" in output.err
    assert "differs from what was trained" not in output.err
    written = json.loads((tmp_path / "out" / "export.json").read_text())
    assert written["passed"] is False
    assert [len(written["failed"]), len(written["comparisons"])] == [2, 1]
    assert sorted(path.name.split("-")[-1] for path in (tmp_path / "out").glob("*.gguf")) == ["F16.gguf", "Q4_0.gguf"]
    assert call(*arguments[:5], "q5_0", "-o", tmp_path / "alone") == ModelError.exit_code
    assert not (tmp_path / "alone").exists(), "nothing is left of one that is all there is"


def test_a_mistake_of_ours_in_one_target_is_shown_and_the_others_go_on(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("lowrank.export.targets.merged.write_shards", lambda *arguments: {}["wanted"])
    assert call("export", adapter, "--to", "merged,peft", "-o", tmp_path, "--no-verify") == 1
    assert "merged failed: KeyError: 'wanted'" in capsys.readouterr().err
    assert "Traceback" in caplog.text
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()


def test_a_hub_that_refuses_one_gets_the_others(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, repository: str, *, dry_run: bool) -> dict[str, Any]:
        if repository.endswith("peft"):
            raise OutputError("the hub refuses the upload")
        return {"repository": repository, "url": repository, "files": 1, "dry_run": dry_run}

    monkeypatch.setattr("lowrank.export.publish.hub.push_folder", refuse)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    arguments = ("export", adapter, "--to", "peft,merged", "-o", tmp_path, "--no-verify", "--push", "me/it", "--json")
    assert call(*arguments) == 5
    result = json.loads(capsys.readouterr().out)
    assert [each["repository"] for each in result["pushed"]] == ["me/it-merged"]
    assert "refuses" in result["targets"]["peft"]["push_error"]
    assert result["passed"] is False


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_shows_its_numbers_at_80_columns(width: int) -> None:
    """Of the longest kind: rounded files with names as hubs give them, and all columns."""
    numbers = {"mean_kl": 0.00012345, "top1_agreement": 0.99876, "perplexity": 12345.6, "gain_kept": -0.98765,
               "against": "f16", "against_mean_kl": 0.000065, "greedy_same": 11, "greedy_prompts": 16,
               "reference_perplexity": 12.5, "base_perplexity": 99.0, "tokens": 512, "problems": []}  # fmt: skip
    names = ["Meta-Llama-3.1-8B-Instruct-my-adapter-q4_k_m.gguf", "Meta-Llama-3.1-8B-Instruct-my-adapter-q8_0.gguf"]
    compared = [{**numbers, "name": name, "passed": name == names[0]} for name in names]
    target = {"comparisons": compared, "compared_on": "rows", "path": "/out", "bytes": 1, "written": []}
    text = io.StringIO()
    show(Console(file=text, width=width), {"targets": {"gguf": target}})
    assert "…" not in text.getvalue()
    rows = [line for line in text.getvalue().splitlines() if "11 of 16" in line]
    assert len(rows) == 2
    for row, verdict in zip(rows, ("same", "differs")):
        assert row.split()[1:] == ["0.00012", "6.5e-05", "99.9%", "1.235e+04", "-98.8%", "11", "of", "16", verdict]
        assert len(row.rstrip()) <= width

    compared = [{**numbers, "name": name, "passed": True} for name in ("merged", "merged, asked about a picture")]
    text = io.StringIO()
    show(Console(file=text, width=width), {"targets": {"merged": {**target, "comparisons": compared}}})
    assert "picture" in text.getvalue(), "two rows that only differ in what was asked"

    same = {**target, "comparisons": [{**numbers, "name": "adapter-q8_0.gguf", "passed": True}]}
    text = io.StringIO()
    show(Console(file=text, width=width), {"targets": {"gguf": same, "ollama": same}})
    rows = [line.split()[0] for line in text.getvalue().splitlines() if "11 of 16" in line]
    assert rows == ["gguf:", "ollama:"], "files of one name in two targets"


def test_dry_run_and_the_place_by_default(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    arguments = ("export", adapter, "--to", "peft,merged", "--dry-run", "--push", "me/it", "--json")
    assert call(*arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["targets"]["merged"]["path"] == f"{adapter}-export/mine/merged"
    assert result["targets"]["merged"]["disk_bytes"] > 50_000
    assert [each["repository"] for each in result["pushed"]] == ["me/it-peft", "me/it-merged"]
    assert not Path(f"{adapter}-export").exists()


def test_settings_of_targets() -> None:
    one, other = read_targets("peft,merged", ["merged.max_shard_size=2GB"], {"dtype": "float16"})
    assert (one.model_dump(), other.model_dump()) == (
        {"type": "peft", "dtype": "float16"},
        {"type": "merged", "dtype": "float16", "max_shard_size": "2GB"},
    )
    with pytest.raises(ConfigError) as refused:
        read_targets("peft,mergd,peft", ["dtype=float16", "nothing"], {"types": "q8_0"})
    text = str(refused.value)
    assert "--to mergd: there is no such target; did you mean 'merged'?" in text
    assert "--to peft: named twice" in text
    assert "say whose: peft.dtype=..." in text
    assert "'nothing': expected KEY=VALUE" in text
    assert "--type q8_0: peft, mergd, peft has no such setting" in text
    with pytest.raises(
        ConfigError, match=r"merged\.dtype: expected .*got 'int3'(.|\n)*merged\.max_shard_size: expected a size"
    ):
        read_targets("merged", ["dtype=int3", "max_shard_size=much"], {})
    assert read_combination(None, None, 0.5) is None
    with pytest.raises(ConfigError, match="--weights a,b: expected numbers"):
        read_combination("add", "a,b", 0.5)
    with pytest.raises(ConfigError, match="--combine: expected"):
        read_combination("mix", None, 0.5)


# ---- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[Any]:
    with hub_stand_in() as served:
        yield served


def test_what_was_written_is_uploaded(
    adapter: Path, tmp_path: Path, hub: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, endpoint = hub
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    arguments = ("export", adapter, "--to", "peft", "--no-verify", "--push", "me/it", "-o")
    code = call(*arguments, tmp_path / "out")
    done = capsys.readouterr()
    assert code == 0, done
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert kind.repositories == {"me/it": written}
    assert kind.private == {"me/it": True}
    assert f"uploaded to {endpoint}/me/it" in done.out
    assert "hf_secret" not in done.out + done.err
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert call(*arguments, tmp_path / "again") == 5
    refused = capsys.readouterr()
    assert "parameters of a lora" in refused.out, "what was written is told"
    assert "the hub refuses the upload" in refused.err
    assert "hf_wrong" not in refused.out + refused.err
    assert (tmp_path / "again" / "adapter_model.safetensors").is_file()


def test_pushing_needs_a_token_and_a_name(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    assert call("export", adapter, "-o", tmp_path / "out", "--push", "me/it") == 2
    assert "set HF_TOKEN" in capsys.readouterr().err
    assert call("export", adapter, "-o", tmp_path / "out", "--push", "it") == 2
    assert "expected owner/name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""Every file and folder of ours has the mode that the umask says, whichever library wrote its bytes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowrank.checkpoints.atomic import new_file, new_folder
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca
from tests.command_line import lowrank


def modes(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, int]:
    """Files and folders by their mode, and one of each."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        if path.relative_to(folder).parts[:1] not in [(name,) for name in but]:
            found[f"{'folder' if path.is_dir() else 'file'} {path}"] = stat.S_IMODE(path.lstat().st_mode)
    return found


@pytest.mark.skipif(os.name == "nt", reason="no modes there")
@pytest.mark.parametrize("umask", [0o022, pytest.param(0o077, marks=pytest.mark.slow)])
def test_training_and_export_write_by_the_umask(umask: int, tmp_path: Path) -> None:
    save_checkpoint_folder(tmp_path / "model")
    write_alpaca(tmp_path / "rows.json", 16)
    work = tmp_path / "work"
    work.mkdir()
    work.chmod(0o777 & ~umask)
    done = lowrank(
        "train", f"model={tmp_path / 'model'}", f"data={tmp_path / 'rows.json'}", "data.validation_split=0.25",
        "data.batch_size=4", "max_steps=2", "save_steps=1", "output_dir=run", "model.device=cpu",
        cwd=work, umask=umask,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    done = lowrank("export", "run", "--to", "peft,merged,gguf", "-o", "out", "--no-verify", cwd=work, umask=umask)
    assert done.returncode == 0, done.stdout + done.stderr
    done = lowrank("quantize", str(tmp_path / "model"), "-o", "packed", cwd=work, umask=umask)
    assert done.returncode == 0, done.stdout + done.stderr
    found = modes(work)
    assert {Path(name).suffix for name in found} >= {
        ".safetensors",
        ".json",
        ".gguf",
        ".png",
        ".md",
        ".jsonl",
        ".jinja",
    }
    expected = {"file": 0o666 & ~umask, "folder": 0o777 & ~umask}
    assert {name: oct(mode) for name, mode in found.items() if mode != expected[name.split()[0]]} == {}


@pytest.mark.skipif(os.name == "nt", reason="no modes there")
def test_the_one_writer_sets_modes_and_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "base").write_text("of the base")
    (tmp_path / "base").chmod(0o440)
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "made") as partial:
            save_file({"a": torch.zeros(2)}, partial / "a.safetensors")
            os.link(tmp_path / "base", partial / "linked")
            (partial / "soft").symlink_to(tmp_path / "base")
            (partial / "program").touch(mode=0o700)
            (partial / "inner").mkdir(mode=0o700)
        with new_file(tmp_path / "b.safetensors") as place:
            save_file({"a": torch.zeros(2)}, place)
    finally:
        os.umask(before)
    made = tmp_path / "made"
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in [*made.iterdir(), made]} == {
        "a.safetensors": "0o640", "linked": "0o440", "soft": "0o440", "program": "0o740", "inner": "0o750",
        "made": "0o750",
    }  # fmt: skip
    assert stat.S_IMODE((tmp_path / "b.safetensors").stat().st_mode) == 0o640

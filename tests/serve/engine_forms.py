"""The forms in which the engine contract has its base and adapters: what an engine may read."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import torch

import lowrank.models.tiny as shipped
from lowrank.checkpoints.peft_layout import AdapterOnDisk
from lowrank.pipelines.inference import InferenceModel
from lowrank.serve.engines import EngineKind
from tests.serve.running import save


def _run_folder(trained: InferenceModel, place: Path, adapters: Path) -> Path:
    run = place / "run"
    for name in ("one", "two"):
        save(trained, trained.slots[name], run / name / "best")
    save(trained, trained.slots["one"], adapters / "three")
    settings = {"model": {"path": "lowrank/tiny", "dtype": "float32"}, "output_dir": str(run)}
    settings |= {"data": {"train": ["unread.json"]}, "jobs": [{"name": "one"}, {"name": "two"}]}
    (run / "config.json").write_text(json.dumps(settings), "utf-8")
    return run


def _gguf_file(trained: InferenceModel, place: Path, adapters: Path) -> Path:
    """Nothing is written where the package for it is missing."""
    path = place / "tiny.gguf"
    if importlib.util.find_spec("gguf") is None:
        return path
    from lowrank.export.gguf.adapter import write_adapter_file
    from lowrank.export.gguf.convert import convert, plan
    from lowrank.export.gguf.model import read_folder

    source = Path(shipped.__path__[0])
    convert(source, path, "f32")
    for name in ("one", "two"):
        saved = trained.bank.saved(trained.slots[name])
        tensors = {key: value.to(torch.float32) for key, value in saved.tensors.items()}
        adapter = AdapterOnDisk(saved.config, tensors, saved.ranks)
        write_adapter_file(plan(read_folder(source)), adapter, adapters / f"{name}.gguf")
    return path


FORMS: dict[str, Callable[[InferenceModel, Path, Path], Path]] = {"run": _run_folder, "gguf": _gguf_file}
"""Each writes `trained` (`lowrank/tiny` with the adapters `one` and `two`) below `place`, adapters that may be loaded
from there below `adapters` (as `three`, or under their names), and says what `lowrank serve` is given."""


class Forms:
    """One base with the adapters `one` and `two`, in every form that an engine may read."""

    def __init__(self, trained: InferenceModel, place: Path) -> None:
        self.adapters = place / "adapters"
        self.adapters.mkdir(parents=True)
        self.paths = {name: write(trained, place, self.adapters) for name, write in FORMS.items()}

    @property
    def run(self) -> Path:
        """A run folder."""
        return self.paths["run"]

    @property
    def gguf(self) -> Path:
        """A GGUF file."""
        return self.paths["gguf"]

    def read_by(self, kind: EngineKind) -> str:
        """The form for `kind`."""
        found = next((str(path) for path in self.paths.values() if kind.reads(str(path))), None)
        assert found, (
            f"no form here is of {kind.takes}: add a function that writes it to FORMS in {Path(__file__).name}"
        )
        return found

    def foreign_to(self, kind: EngineKind) -> str | None:
        """One that `kind` does not read; None: it reads all of them."""
        return next((str(path) for path in self.paths.values() if not kind.reads(str(path))), None)

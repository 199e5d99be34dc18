"""The adapter alone as a GGUF file, which llama.cpp loads over the base's own file at run time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from lowrank.checkpoints.peft_layout import AdapterOnDisk
from lowrank.errors import ModelError, raise_all
from lowrank.export import Needs, Progress, ReadBack
from lowrank.export.gguf.adapter import MERGE, adapter_trouble, write_adapter_file
from lowrank.export.gguf.convert import plan, write_plan
from lowrank.export.gguf.llama_cpp import unreachable
from lowrank.export.gguf.model import read_folder, read_merged
from lowrank.export.source import Source
from lowrank.export.targets.gguf import LlamaReader, tolerance
from lowrank.settings import Settings


class Config(Settings):
    """The adapter alone, for llama.cpp."""

    type: Literal["lora_gguf"] = "lora_gguf"

    def build(self) -> LoraGgufTarget:
        """The target."""
        return LoraGgufTarget(self)


class LoraGgufTarget:
    """See the module."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def needs(self, source: Source) -> Needs:
        """The size of the adapter, and of the base's file while the result is checked."""
        adapter = _adapter(source)
        problems = adapter_trouble(plan(read_folder(source.base)), adapter)
        raise_all(ModelError, f"this adapter cannot be a GGUF file of its own; {MERGE}", problems)
        size = sum(4 * tensor.numel() for tensor in adapter.tensors.values())
        return Needs(size + (64 << 20), 2 * size + (64 << 20))

    def write(self, source: Source, folder: Path, progress: Progress) -> Sequence[str]:
        """One file."""
        adapter = _adapter(source)
        write_adapter_file(plan(read_folder(source.base)), adapter, self.path(source, folder))
        progress(1, 1)
        return (f"{len(adapter.targets)} modules; the scale is in the tensors, so a scale of 1 is right for any rank",)

    def read_back(self, source: Source, folder: Path) -> Sequence[ReadBack]:
        """Over the base's own file in float32, which is made for the purpose and removed again."""
        if unreachable():
            return ()
        path = self.path(source, folder)
        return (ReadBack(path.name, tolerance("f32"), lambda: OverBase(source, path)),)

    def usage(self, source: Source, path: str) -> str:
        """With llama.cpp and Ollama."""
        name = self.path(source, Path(path))
        return f"```\nllama-server -m BASE.gguf --lora {name}\n```"

    def path(self, source: Source, folder: Path) -> Path:
        """The file."""
        return folder / f"{source.name}-lora.gguf"


class OverBase(LlamaReader):
    """The base in llama.cpp with the adapter over it."""

    def __init__(self, source: Source, path: Path) -> None:
        self._folder = tempfile.TemporaryDirectory()
        side, file = Path(self._folder.name, "side"), Path(self._folder.name, "base.gguf")
        side.mkdir()
        write_plan(plan(read_merged(replace(source, adapter=None), side)), file, "f32")
        super().__init__(file, [(path, 1.0)])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._folder.cleanup()


def _adapter(source: Source) -> AdapterOnDisk:
    if source.adapter is None:
        raise ModelError(f"{source.name} is a whole model, there is no adapter to write; export --to gguf")
    return source.adapter

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
from lowrank.export import ExportProgress, Needs, ReadBack
from lowrank.export.gguf.adapter import adapter_incompatibility, write_adapter_file
from lowrank.export.gguf.convert import plan, write_plan
from lowrank.export.gguf.llama_cpp import unreachable
from lowrank.export.gguf.model import read_folder, read_merged
from lowrank.export.merge.tensor_names import Names, refuse_unmergeable
from lowrank.export.merge.weights import Weights
from lowrank.export.source import Source
from lowrank.export.targets.gguf import GGUFExportConfig, LlamaReader, tolerance
from lowrank.settings import Settings


class LoraGGUFExportConfig(Settings):
    """The adapter alone, for llama.cpp."""

    type: Literal["lora_gguf"] = "lora_gguf"
    merged_type: str = "q8_0"
    """Of the whole model, which is written instead where llama.cpp cannot apply the adapter at run time (DoRA, weights
    trained whole, experts, tied heads)."""

    def build(self) -> LoraGgufTarget:
        """A `LoraGgufTarget`, with these settings; nothing is written before `write`."""
        return LoraGgufTarget(self)


class LoraGgufTarget:
    """See the module."""

    def __init__(self, config: LoraGGUFExportConfig) -> None:
        self.config = config
        self.merged = GGUFExportConfig(types=(config.merged_type,)).build()

    def needs(self, source: Source) -> Needs:
        """The size of the adapter, and of the base's file while the result is checked."""
        adapter = _adapter(source)
        refuse_unmergeable(source.name, adapter)
        raise_all(ModelError, f"{source.name}: this adapter does not fit its base", _names(source).refusals(adapter))
        problems = runtime_incompatibility(source)
        if problems:
            needs = self.merged.needs(source)
            described = f"llama.cpp cannot apply this adapter at run time ({'; '.join(problems[:3])})"
            note = f"{described}, so the merged model is written instead, as {self.config.merged_type}"
            return replace(needs, notes=(note, *needs.notes))
        size = sum(4 * tensor.numel() for tensor in adapter.tensors.values())
        return Needs(size + (64 << 20), 2 * size + (64 << 20))

    def write(self, source: Source, folder: Path, progress: ExportProgress) -> Sequence[str]:
        """One file."""
        if runtime_incompatibility(source):
            return self.merged.write(source, folder, progress)
        adapter = _adapter(source)
        write_adapter_file(plan(read_folder(source.base)), adapter, self.path(source, folder))
        progress(1, 1)
        return (f"{len(adapter.targets)} modules; the scale is in the tensors, so a scale of 1 is right for any rank",)

    def read_back(self, source: Source, folder: Path) -> Sequence[ReadBack]:
        """Over the base's own file in float32, which is made for the purpose and removed again."""
        if runtime_incompatibility(source):
            return self.merged.read_back(source, folder)
        if unreachable():
            return ()
        path = self.path(source, folder)
        return (ReadBack(path.name, tolerance("f32"), lambda: OverBase(source, path)),)

    def usage(self, source: Source, path: str) -> str:
        """With llama.cpp and Ollama."""
        if runtime_incompatibility(source):
            return self.merged.usage(source, path)
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


def runtime_incompatibility(source: Source) -> list[str]:
    """Why there is no file of the adapter alone; empty: there can be one."""
    try:
        base = plan(read_folder(source.base))
    except ModelError as error:  # a family that only llama.cpp's own converter knows
        return [str(error).splitlines()[0]]
    return adapter_incompatibility(base, _adapter(source))


def _names(source: Source) -> Names:
    return Names(source.base, Weights(source.base), trust_remote_code=source.model.runs_own_code)


def _adapter(source: Source) -> AdapterOnDisk:
    if source.adapter is None:
        raise ModelError(f"{source.name} is a whole model, there is no adapter to write; export --to gguf")
    return source.adapter

"""A GGUF file and the Modelfile that makes an Ollama model of it; or the adapter alone, over a base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lowrank.data.chat.template_sandbox import render_text
from lowrank.errors import ConfigError, DataError, ModelError, raise_all
from lowrank.export import ExportProgress, Needs, ReadBack
from lowrank.export.gguf.llama_cpp import unreachable
from lowrank.export.publish.go_template import Turns, turn_texts
from lowrank.export.publish.modelfile import Modelfile, printable
from lowrank.export.source import Source
from lowrank.export.targets.gguf import GGUFExportConfig, LlamaReader, as_types, tolerance
from lowrank.export.targets.lora_gguf import LoraGGUFExportConfig, runtime_incompatibility
from lowrank.foreign_files import read_json
from lowrank.settings import Settings

MODELFILE = "Modelfile"
_MOST_CONTEXT = 8192
"""Ollama reserves memory for the whole context when a model is loaded."""
_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


def _one_type(value: Any) -> Any:
    types = as_types(value)
    if isinstance(types, (list, tuple)) and len(types) != 1:
        raise ValueError(f"an Ollama model has one type, got {', '.join(map(str, types))}; --type is for all targets, "
                         "gguf.types=... for one")  # fmt: skip
    return types


class OllamaExportConfig(Settings):
    """An Ollama model: a GGUF file and a Modelfile."""

    type: Literal["ollama"] = "ollama"
    types: Annotated[tuple[str], BeforeValidator(_one_type)] = ("q8_0",)
    """What the weights of the GGUF file are stored in: one type, as with `gguf`."""
    as_adapter: bool = False
    """Keep the adapter apart: FROM the base, ADAPTER the adapter. Several adapters can then share one base."""
    base: str | None = None
    """With as_adapter: the name of a model that the Ollama server has and that is this adapter's base, for example
    llama3.2:1b-instruct-fp16. Left out: the base is written as a GGUF file too."""
    template: bool = False
    """Write a TEMPLATE in Go's language, for Ollama before 0.30. Later ones use the chat template in the GGUF file,
    which is exact and knows tools; a TEMPLATE would replace it."""
    system: str | None = None
    """SYSTEM: the system prompt that the model has by default."""
    num_ctx: int = Field(default=0, ge=0)
    """Context length in tokens; 0: the model's own, 8192 at the most, since memory is reserved for all of it."""
    importance: str | None = None
    """A text file or `data`, for the importance matrix of quantized types; see gguf.importance."""
    threads: int = 0
    """Threads that quantize; see gguf.threads."""
    converter: Path | None = None
    """A folder with llama.cpp's source, whose converter then does families that lowrank does not know; see
    gguf.converter."""
    mmproj: bool | Literal["auto"] = "auto"
    """The towers of a model that sees or hears, as a second file and a second FROM; see gguf.mmproj. With as_adapter
    the language model alone is written."""

    def build(self) -> OllamaTarget:
        """An `OllamaTarget`, with these settings; nothing is written before `write`."""
        return OllamaTarget(self)


class OllamaTarget:
    """See the module."""

    def __init__(self, config: OllamaExportConfig) -> None:
        if config.base is not None and not config.as_adapter:
            raise ConfigError("ollama.base goes with ollama.as_adapter=true: a merged model needs no base")
        self.config = config
        if config.as_adapter and config.mmproj is True:
            raise ConfigError("ollama.mmproj: true goes with a merged model; leave ollama.as_adapter out")
        mmproj = False if config.as_adapter else config.mmproj
        self.gguf = GGUFExportConfig(
            types=config.types,
            importance=config.importance,
            threads=config.threads,
            converter=config.converter,
            mmproj=mmproj,
        ).build()
        self.lora = LoraGGUFExportConfig().build()

    def needs(self, source: Source) -> Needs:
        """Those of the GGUF files. The Modelfile is made here once, so that what it cannot hold is refused first."""
        self._modelfile(source).text()
        parts = []
        if self.config.base is None:
            parts.append(self.gguf.needs(self._model(source)))
        if self.config.as_adapter:
            problems = runtime_incompatibility(source)
            raise_all(
                ModelError, "ollama.as_adapter: llama.cpp cannot apply this adapter; leave as_adapter out", problems
            )
            parts.append(self.lora.needs(source))
        notes = [note for part in parts for note in part.notes]
        if self.has_tower:
            notes.append("a tower in a file of its own is for Ollama from 0.30 on, which runs llama.cpp")
        if self.config.template:
            notes.append("the TEMPLATE is for Ollama before 0.30; tool calls are not in it")
        if self.config.base is not None:
            notes.append(f"nothing is compared: only your Ollama server has {self.config.base}")
        return Needs(
            sum(part.disk_bytes for part in parts),
            max(part.memory_bytes for part in parts),
            tuple(notes),
            tuple(install for part in parts for install in part.installs),
        )

    def write(self, source: Source, folder: Path, progress: ExportProgress) -> Sequence[str]:
        """The GGUF files, then the Modelfile beside them."""
        described: list[str] = []
        if self.config.as_adapter:
            described += self.lora.write(source, folder, lambda done, total, what="": None)
        if self.config.base is None:
            described += self.gguf.write(self._model(source), folder, progress)
        modelfile = self._modelfile(source)
        (folder / MODELFILE).write_text(modelfile.text(), encoding="utf-8")
        settings = ", ".join(f"{name} {value}" for name, value in modelfile.parameters)
        projector = f", FROM {modelfile.projector}" if modelfile.projector else ""
        return [*described, f"Modelfile: FROM {modelfile.model}{projector}, {settings}"]

    @property
    def has_tower(self) -> bool:
        """Whether a second file, for what the model sees or hears, is written."""
        return self.gguf.has_tower

    def read_back(self, source: Source, folder: Path) -> Sequence[ReadBack]:
        """The files that the Modelfile names, in llama.cpp, which is what Ollama runs."""
        if self.config.base is not None or unreachable():
            return ()
        if not self.config.as_adapter:
            return self.gguf.read_back(source, folder)
        base, adapter = self._file(source, folder), folder / self._adapter_name(source)
        allowed = tolerance(self.config.types[0])
        temporary = self.gguf.temporary(self._model(source), folder)
        return (ReadBack(adapter.name, allowed, lambda: LlamaReader(base, [(adapter, 1.0)]), temporary=temporary),)

    def usage(self, source: Source, path: str) -> str:
        """With Ollama's own command, and without it."""
        return (
            f"```\ncd {path} && ollama create {source.name.lower()}\nollama run {source.name.lower()}\n```\n\n"
            f"Or to any Ollama server: `lowrank deploy ollama {source.name.lower()} {path}`."
        )

    def _model(self, source: Source) -> Source:
        """What becomes the GGUF file of FROM."""
        return replace(source, name=f"{source.name}-base", adapter=None) if self.config.as_adapter else source

    def _file(self, source: Source, folder: Path) -> Path:
        return self.gguf.path(self._model(source), folder, self.config.types[0])

    def _adapter_name(self, source: Source) -> str:
        return self.lora.path(source, Path()).name

    def _modelfile(self, source: Source) -> Modelfile:
        name = self._file(source, Path()).name
        return Modelfile(
            model=self.config.base or f"./{name}",
            adapter=f"./{self._adapter_name(source)}" if self.config.as_adapter else None,
            projector=f"./{self.gguf.tower_path(source, Path()).name}" if self.has_tower else None,
            template=go_template(source) if self.config.template else None,
            system=self.config.system,
            license=_license(source),
            parameters=(("num_ctx", self.config.num_ctx or _context(source)), *_stops(source)),
        )


def go_template(source: Source) -> str:
    """The source's chat template in Go's language. Raises ModelError where that cannot be."""
    if source.chat_template is None:
        raise ModelError(f"{source.name} has no chat template, so there is no TEMPLATE to write")

    def render(turns: Turns, waiting: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return render_text(source.tokenizer, messages, template=source.chat_template, generation_prompt=waiting)

    try:
        return turn_texts(render, source.tokenizer.bos_token).go()
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"the chat template refuses a conversation ({error}); leave ollama.template out") from error


def _context(source: Source) -> int:
    config = read_json(source.base / "config.json")
    text = config.get("text_config") or config
    own = text.get("max_position_embeddings") or text.get("n_positions") or text.get("seq_length") or 2048
    return min(int(own), _MOST_CONTEXT)


def _stops(source: Source) -> list[tuple[str, str]]:
    """Every token that ends an answer, as text."""
    tokens = source.tokenizer.convert_ids_to_tokens(sorted(source.stop_tokens)) if source.stop_tokens else []
    return [("stop", token) for token in dict.fromkeys(tokens) if token]


def _license(source: Source) -> str | None:
    """The base's, without what a Modelfile cannot hold (form feeds)."""
    path = next((source.base / name for name in _LICENSES if (source.base / name).is_file()), None)
    if path is None:
        return None
    try:
        return printable(path.read_text(encoding="utf-8")).replace('"""', "'''")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error

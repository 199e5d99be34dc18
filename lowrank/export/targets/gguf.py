"""The merged model as GGUF files, for llama.cpp, Ollama, LM Studio: one file for each type asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator

from lowrank.errors import ModelError, is_disk_full, raise_all
from lowrank.export import ExportProgress, ImageQuestion, Install, Needs, ReadBack, Tolerance
from lowrank.export.gguf.convert import PLAIN_TYPES
from lowrank.export.gguf.converters import Converter, converter_for
from lowrank.export.gguf.importance import DATA, documents_for
from lowrank.export.gguf.llama_cpp import Adapters, LlamaCpp, unreachable
from lowrank.export.gguf.mixes import BASES, NEED_IMPORTANCE
from lowrank.export.gguf.pretokenizers import MOST_DIFFERENT
from lowrank.export.gguf.quantize import check_recipe, missing_kernels, quantize_file
from lowrank.export.gguf.tokenizer_check import compare_tokenizers
from lowrank.export.gguf.tower import TowerFile
from lowrank.export.gguf.upstream import Upstream
from lowrank.export.source import Source, with_pictures
from lowrank.segments import Segment
from lowrank.settings import Settings

BITS = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q5_k_s": 5.5, "q5_0": 5.5,
    "q5_1": 6.0, "q4_k_m": 4.9, "q4_k_s": 4.6, "q4_0": 4.6, "q4_1": 5.0, "q3_k_l": 4.3, "q3_k_m": 4.0, "q3_k_s": 3.6,
}  # fmt: skip
"""Bits a weight; for all others 4.5."""

_KL = {
    "f32": 1e-6, "f16": 1e-4, "bf16": 1e-2, "q8_0": 1e-2, "q6_k": 3e-2, "q5_k_m": 5e-2, "q5_k_s": 6e-2, "q5_1": 6e-2,
    "q5_0": 8e-2, "q4_k_m": 0.15, "q4_k_s": 0.2, "q4_1": 0.25, "q4_0": 0.3,
}  # fmt: skip
"""Mean KL from base + adapter that a type may cost: several times what is reported for 8 B models (llama.cpp's
tools/perplexity/README.md), since small models suffer more. For all others 1.0."""


_TOWER_KL = 2e-2
"""And what pictures may cost: llama.cpp computes towers in 16 bits whatever their file holds."""


def as_types(value: Any) -> Any:
    """`q8_0,Q4_K_M` as a tuple of types in small letters."""
    return tuple(part.strip().lower() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class GGUFExportConfig(Settings):
    """GGUF files of the merged model."""

    type: Literal["gguf"] = "gguf"
    types: Annotated[tuple[str, ...], BeforeValidator(as_types)] = ("q8_0",)
    """What the weights are stored in, one file each: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0, q3_k_m, ..."""
    importance: str | None = None
    """A text file (UTF-8) like what the model will be used for, at least 512 tokens, or `data` for rows it was trained
    on: quantized types then spend their bits on the channels that matter there. The smallest (iq3_xxs, iq2_*, iq1_*)
    need it, and take the training rows by themselves."""
    threads: int = 0
    """Threads that quantize; 0: one for each core."""
    converter: Path | None = None
    """A folder with llama.cpp's source, whose converter then does families that lowrank does not know. Left out: it is
    fetched from PyPI when it is needed."""
    mmproj: bool | Literal["auto"] = "auto"
    """The towers of a model that sees or hears, as a second file for llama.cpp's --mmproj. llama.cpp's own converter
    writes it, which is fetched from PyPI if it is not there (77 MB). auto: where that converter knows the family, else
    the language model alone is written, and why; true: refused where it cannot be; false: the language model alone."""

    def build(self) -> GgufTarget:
        """A `GgufTarget`, with these settings; nothing is written before `write`."""
        return GgufTarget(self)


class GgufTarget:
    """See the module."""

    def __init__(self, config: GGUFExportConfig) -> None:
        self.config = config
        known = [*PLAIN_TYPES, *(name.lower() for name in BASES)]
        for name in config.types:
            if name not in known:
                check_recipe(name)
        self.quantized = [name for name in config.types if name not in PLAIN_TYPES]
        self.failures: dict[str, Exception] = {}
        self._tower: TowerFile | None = None

    def needs(self, source: Source) -> Needs:
        """All files, the 16-bit one that quantized ones are made from, and one tensor in memory."""
        raise_all(ModelError, "--to gguf", missing_kernels(self.quantized))
        documents = self._documents(source)
        with tempfile.TemporaryDirectory() as side:
            converter = self._converter(source, Path(side))
            tower = self._tower = self._tower_of(source, converter)
        counts = [int(np.prod(shape)) for shape in converter.model.shapes.values()]
        kinds = [*self.config.types, *self._between()]
        disk = sum(_bytes(converter, kind) for kind in kinds) + converter.between_bytes
        notes = [*converter.notes, *filter(None, [_unchecked()])]
        installs = converter.installs
        if tower is not None:
            disk += tower.num_bytes(self._tower_type())
            notes.append(tower.note())
            installs = _at_once([*installs, *tower.installs])
        if documents:
            origin = self.config.importance if self.config.importance not in (None, DATA) else "the training rows"
            shown = with_pictures(documents)
            notes.append(f"importance is measured on {sum(map(len, documents)):,} tokens of {origin}{shown}")
        return Needs(disk + (64 << 20), 4 * max(counts) + (256 << 20), tuple(notes), installs)

    def write(self, source: Source, folder: Path, progress: ExportProgress) -> Sequence[str]:
        """One file for each type; what each really holds. A type that fails is in `failures`, unless all do."""
        described: list[str] = []
        self.failures = {}
        importance = None
        with tempfile.TemporaryDirectory(dir=folder) as side:
            converter = self._converter(source, Path(side))
            done = 0
            plain = [*[name for name in self.config.types if name in PLAIN_TYPES], *self._between()]
            total = sum(_bytes(converter, kind) for kind in [*plain, *self.quantized])
            for kind in plain:
                start, size = done, _bytes(converter, kind)

                def on_progress(written: int, of: int, kind: str = kind, start: int = start, size: int = size) -> None:
                    progress(start + size * written // of, total, kind)

                with self._part(source, folder, kind):
                    converter.write(self.path(source, folder, kind), kind, on_progress)
                done += size
            documents = self._documents(source)
            if documents:
                importance = converter.importance(documents)
            whole = next(name for name in plain if name not in self.failures)
            described += self._compare_tokenizers(self.path(source, folder, whole), Path(side))
            for name in self.quantized:
                origin, target = self._origin(source, folder), self.path(source, folder, name)
                start, size = done, _bytes(converter, name)

                def counted(weights: int, of: int, name: str = name, start: int = start, size: int = size) -> None:
                    progress(start + size * weights // of, total, name)

                threads = self.config.threads or None
                with self._part(source, folder, name):
                    written = quantize_file(
                        origin, target, name, importance=importance, threads=threads, progress=counted
                    )
                    described += [str(written), *written.notes]
                done += size
            described += self._write_tower(source, folder, Path(side))
        if _unchecked():
            for path in self.temporary(source, folder):
                path.unlink()
        return described

    @contextmanager
    def _part(self, source: Source, folder: Path, kind: str) -> Generator[None, None, None]:
        """A type on its own; what others are made from, and the last that is left, fail as a whole. So does a full
        disk, on which nobody else will find room."""
        try:
            yield
        except Exception as error:
            needed = kind == self._origin_type() and self.quantized
            if needed or is_disk_full(error) or len(self.failures) + 1 == len(self.config.types):
                raise
            self.failures[kind] = error
            self.path(source, folder, kind).unlink(missing_ok=True)

    def read_back(self, source: Source, folder: Path) -> Sequence[ReadBack]:
        """Every file as llama.cpp loads it; none where llama.cpp cannot be asked."""
        if _unchecked():
            return ()
        found = []
        rounded_from = _read_back(self._origin(source, folder)) if self.quantized else None
        for kind in self._whole():
            path = self.path(source, folder, kind)
            if kind in PLAIN_TYPES:
                found.append(_read_back(path, kind))
            else:
                temporary = self.temporary(source, folder)
                found.append(replace(_read_back(path, kind), against=rounded_from, temporary=temporary))
        if self.has_tower:
            found.append(self._read_tower(source, folder))
        return found

    def _read_tower(self, source: Source, folder: Path) -> ReadBack:
        """Beside the first of the language model's files."""
        kind = self._whole()[0]
        path, tower, allowed = self.path(source, folder, kind), self.tower_path(source, folder), tolerance(kind)
        kl = max(allowed.mean_kl, _TOWER_KL)
        allowed = replace(allowed, mean_kl=kl, top1_agreement=max(0.5, 1.0 - kl**0.5), perplexity=kl)
        name = f"{tower.name} beside {path.name}"
        return ReadBack(
            name, allowed, lambda: LlamaReader(path, tower=tower), compares_images=True, compares_text=False
        )

    def usage(self, source: Source, path: str) -> str:
        """With llama.cpp and Ollama."""
        name = self.path(source, Path(path), self._whole()[0])
        if not self.has_tower:
            return (
                f"```\nllama-server -m {name}\n```\n\n"
                f"Or a `Modelfile` with the line `FROM {name}`, and `ollama create`."
            )
        tower = self.tower_path(source, Path(path))
        return (
            f"```\nllama-server -m {name} --mmproj {tower}\n"
            f"llama-mtmd-cli -m {name} --mmproj {tower} --image picture.jpg -p 'What is this?'\n```\n\n"
            f"Or a `Modelfile` with the lines `FROM {name}` and `FROM {tower}`, and `ollama create`."
        )

    @property
    def has_tower(self) -> bool:
        """Whether a second file, for what the model sees or hears, is written: known from `needs` on, and sure after
        `write`."""
        return self._tower is not None and self._tower.missing is None

    def tower_path(self, source: Source, folder: Path) -> Path:
        """That file. Programs know it by the beginning of its name."""
        return folder / f"mmproj-{source.name}-{self._tower_type().upper()}.gguf"

    def _tower_type(self) -> str:
        """16 bits, whatever the language model is rounded to, as towers are handed around; all of them where that has
        all as well."""
        return "f32" if "f32" in self.config.types else "bf16" if self.config.types == ("bf16",) else "f16"

    def _tower_of(self, source: Source, converter: Converter) -> TowerFile | None:
        """None: a language model without any. ModelError where one is asked for by name and cannot be."""
        model, wanted = converter.model, self.config.mmproj
        if model.beside is not None:
            return TowerFile(source, model, model.beside, wanted, Upstream(self.config.converter))
        if wanted is True:
            raise ModelError(
                f"gguf.mmproj: true, and {source.name} has no vision or audio tower to write; leave it out"
            )
        return None

    def _write_tower(self, source: Source, folder: Path, side: Path) -> list[str]:
        """Beside the language model's files; what came of it."""
        if self._tower is None or self._tower.missing:
            return []
        path = self.tower_path(source, folder)
        self._tower.write(side, path, self._tower_type())
        return [self._tower.note()] if self._tower.missing else []

    def _compare_tokenizers(self, path: Path, side: Path) -> list[str]:
        """Whether llama.cpp reads text as the model was trained to. Raises ModelError if it does not at all."""
        if _unchecked():
            return []
        comparison = compare_tokenizers(path, side)
        if comparison.share > MOST_DIFFERENT:
            raise ModelError(
                f"{comparison}: the model would not understand its input. Serve it from its merged checkpoint"
            )
        return [str(comparison)]

    def _documents(self, source: Source) -> list[Segment]:
        """To measure importance on."""
        needed = any(BASES[name.upper()] in NEED_IMPORTANCE for name in self.quantized)
        return documents_for(source, self.config.importance, needed=needed) if self.quantized else []

    def _converter(self, source: Source, side: Path) -> Converter:
        return converter_for(source, side, self.config.types, self.config.converter)

    def _origin(self, source: Source, folder: Path) -> Path:
        """The file that quantized ones are made from, and judged by."""
        return self.path(source, folder, self._origin_type())

    def _origin_type(self) -> str:
        return "f32" if "f32" in self.config.types else "f16"

    def _whole(self) -> list[str]:
        return [kind for kind in self.config.types if kind not in self.failures]

    def _between(self) -> list[str]:
        """Its type, if it is not asked for itself: it is there until the others are compared with it."""
        return ["f16"] if self.quantized and not {"f16", "f32"} & set(self.config.types) else []

    def temporary(self, source: Source, folder: Path) -> tuple[Path, ...]:
        """What is left of `write` for the comparison."""
        return tuple(self.path(source, folder, kind) for kind in self._between())

    def path(self, source: Source, folder: Path, kind: str) -> Path:
        """The file of a type."""
        return folder / f"{source.name}-{kind.upper()}.gguf"


class LlamaReader:
    """A GGUF file in llama.cpp, as an `ExportReader`."""

    def __init__(self, path: Path, adapters: Adapters = (), tower: Path | None = None) -> None:
        self._session = LlamaCpp(path, adapters=adapters, tower=tower)

    def logprobs(self, token_L: np.ndarray, prompt: int | None = None) -> np.ndarray:
        """See `ExportReader`; no prefix language model is written."""
        del prompt
        return _log_softmax(self._session.logits(token_L.tolist()))

    def image_logprobs(self, question: ImageQuestion) -> tuple[np.ndarray, int]:
        """See `ImageReader`."""
        logits_KV, length = self._session.image_logits(
            question.before_L.tolist(), question.pixels_HWC, question.after_L.tolist(), question.rows
        )
        return _log_softmax(logits_KV), length

    def greedy(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        stop_tokens: frozenset[int],
        on_answered: Callable[[int], None],
    ) -> list[list[int]]:
        """See `ExportReader`; ends also where llama.cpp itself would."""
        answers: list[list[int]] = []
        for token_L in prompts:
            answers.append(self._session.generate(token_L.tolist(), max_new_tokens, stop_tokens)[0])
            on_answered(len(answers))
        return answers

    def __enter__(self) -> LlamaReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()


def _log_softmax(logits_LV: np.ndarray) -> np.ndarray:
    """In place."""
    logits_LV -= logits_LV.max(axis=-1, keepdims=True)
    return logits_LV - np.log(np.exp(logits_LV).sum(axis=-1, keepdims=True))


def tolerance(kind: str) -> Tolerance:
    """What a type may cost."""
    kl = _KL.get(kind, 1.0)
    agreement = max(0.5, 1.0 - kl**0.5)
    return Tolerance(mean_kl=kl, top1_agreement=agreement, perplexity=max(1e-4, kl))


def _read_back(path: Path, kind: str = "f16") -> ReadBack:
    return ReadBack(path.name, tolerance(kind), lambda: LlamaReader(path))


def _at_once(installs: list[Install]) -> tuple[Install, ...]:
    """One announcement of what all of them fetch, which is the same converter; each then checks what it is for."""

    def make() -> None:
        for each in installs:
            each.make()

    return (Install(installs[0].description, make),) if installs else ()


def _bytes(converter: Converter, kind: str) -> int:
    return int(sum(int(np.prod(shape)) for shape in converter.model.shapes.values()) * BITS.get(kind, 4.5) / 8)


def _unchecked() -> str | None:
    reason = unreachable()
    return f"the files cannot be checked against llama.cpp here: {reason}" if reason else None

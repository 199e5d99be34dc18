"""Pictures in llama.cpp: its library `mtmd` inside the wheel of xllamacpp, beside the functions of llama_child.py.

As there, the defaults that the library fills in are compared with what is known before anything is trusted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank.export.gguf.llama_structures import ROOM, Bool, Int, Pointer, Unsigned, check_defaults, declare

_TEXT = 0
"""mtmd_input_chunk_type of text; any other is a medium's."""
_KNOWN = {
    "use_gpu": True, "print_timings": True, "n_threads": 4, "media_marker": b"<__media__>", "flash_attn_type": -1,
    "warmup": True, "image_min_tokens": -1, "image_max_tokens": -1,
}  # fmt: skip


class TowerSettings(ctypes.Structure):
    """mtmd_context_params of mtmd.h."""

    _fields_ = (
        ("use_gpu", Bool),
        ("device", Pointer),
        ("print_timings", Bool),
        ("n_threads", Int),
        ("image_marker", ctypes.c_char_p),
        ("media_marker", ctypes.c_char_p),
        ("flash_attn_type", Int),
        ("warmup", Bool),
        ("image_min_tokens", Int),
        ("image_max_tokens", Int),
        ("rest", ctypes.c_uint8 * ROOM),
    )


class InputPart(ctypes.Structure):
    """mtmd_input_part of mtmd.h: a text or a picture."""

    _fields_ = (("text", Pointer), ("bitmap", Pointer))


class LlamaTower:
    """The file of a tower, beside the language model that it belongs to."""

    def __init__(self, library: Any, model: Any, path: str, threads: int) -> None:
        """Raises RuntimeError for a version that is not known, and a file that cannot be loaded."""
        self._library = library
        declare(
            library,
            ("mtmd_context_params_default", TowerSettings, []),
            ("mtmd_init_from_file", Pointer, [ctypes.c_char_p, Pointer, TowerSettings]),
            ("mtmd_support_vision", Bool, [Pointer]),
            ("mtmd_bitmap_init", Pointer, [Unsigned, Unsigned, ctypes.c_char_p]),
            ("mtmd_bitmap_free", None, [Pointer]),
            ("mtmd_input_chunks_init", Pointer, []),
            ("mtmd_input_chunks_size", ctypes.c_size_t, [Pointer]),
            ("mtmd_input_chunks_get", Pointer, [Pointer, ctypes.c_size_t]),
            ("mtmd_input_chunks_free", None, [Pointer]),
            ("mtmd_input_chunk_get_type", Int, [Pointer]),
            ("mtmd_input_chunk_get_n_tokens", ctypes.c_size_t, [Pointer]),
            (
                "mtmd_input_chunk_get_tokens_text",
                ctypes.POINTER(Int),
                [Pointer, ctypes.POINTER(ctypes.c_size_t)],
            ),
            ("mtmd_tokenize_from_parts", Int, [Pointer, Pointer, Pointer, ctypes.c_size_t, Bool]),
            (
                "mtmd_helper_eval_chunk_single",
                Int,
                [Pointer, Pointer, Pointer, Int, Int, Int, Bool, ctypes.POINTER(Int)],
            ),
        )
        settings = library.mtmd_context_params_default()
        check_defaults(settings, _KNOWN)
        settings.use_gpu = settings.print_timings = settings.warmup = False
        settings.n_threads = threads
        settings.flash_attn_type = 0
        self._tower = library.mtmd_init_from_file(path.encode(), model, settings)
        if not self._tower:
            raise RuntimeError("llama.cpp cannot load the tower's file")
        if not library.mtmd_support_vision(self._tower):
            raise RuntimeError("the tower's file is not for pictures")

    def chunks(self, pixels_HWC: np.ndarray) -> Chunks:
        """What a picture becomes in a text; (height, width, 3) uint8."""
        library = self._library
        height, width, _ = pixels_HWC.shape
        bitmap = library.mtmd_bitmap_init(width, height, np.ascontiguousarray(pixels_HWC).tobytes())
        made = library.mtmd_input_chunks_init()
        part = InputPart(None, bitmap)
        parts = (ctypes.POINTER(InputPart) * 1)(ctypes.pointer(part))
        failed = library.mtmd_tokenize_from_parts(self._tower, made, parts, 1, False)
        library.mtmd_bitmap_free(bitmap)
        if failed:
            raise RuntimeError("llama.cpp cannot take this picture")
        return Chunks(library, self._tower, made)


class Chunks:
    """A picture in a text: the tokens before and after it that its family puts there, and the picture between, which
    may be in several parts with tokens between them."""

    def __init__(self, library: Any, tower: Any, made: Any) -> None:
        self._library, self._tower, self._made = library, tower, made
        every = [library.mtmd_input_chunks_get(made, i) for i in range(library.mtmd_input_chunks_size(made))]
        media = [i for i, each in enumerate(every) if library.mtmd_input_chunk_get_type(each) != _TEXT]
        if not media:
            raise RuntimeError("llama.cpp makes nothing of this picture")
        self.before = self._tokens(every[: media[0]])
        self.after = self._tokens(every[media[-1] + 1 :])
        self._inside = every[media[0] : media[-1] + 1]

    @property
    def length(self) -> int:
        """In tokens, without those before and after."""
        return sum(self._library.mtmd_input_chunk_get_n_tokens(each) for each in self._inside)

    def read(self, context: Any, first: int, batch: int) -> int:
        """Into the cache of `context`, from position `first` on; the position behind."""
        behind = Int(first)
        for each in self._inside:
            failed = self._library.mtmd_helper_eval_chunk_single(
                self._tower, context, each, behind.value, 0, batch, False, ctypes.byref(behind)
            )
            if failed:
                raise RuntimeError("llama.cpp cannot compute this picture")
        return behind.value

    def close(self) -> None:
        """Give the memory back."""
        self._library.mtmd_input_chunks_free(self._made)

    def _tokens(self, chunks: Sequence[Any]) -> list[int]:
        found: list[int] = []
        for each in chunks:
            count = ctypes.c_size_t()
            tokens = self._library.mtmd_input_chunk_get_tokens_text(each, ctypes.byref(count))
            found += tokens[: count.value]
        return found

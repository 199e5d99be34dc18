"""llama.cpp in a process of its own: run as a module, one line of JSON a question (see llama_cpp.py).

It talks to the C functions inside the wheel of xllamacpp. Their two structures of settings have changed often,
so the defaults that llama.cpp fills in are compared with what is known before anything is trusted. Nothing heavy
is imported, so that the process starts at once; llama.cpp may end it at any assertion.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.export.gguf.llama_images import LlamaTower
from lowrank.export.gguf.llama_structures import (
    KNOWN_CONTEXT,
    KNOWN_MODEL,
    Bool,
    ContextSettings,
    Float,
    Int,
    LlamaBatch,
    ModelSettings,
    Pointer,
    check_defaults,
    declare,
)

F32 = 0
"""A type of ggml's."""


def open_library() -> Any:
    """The C functions, with their types. Raises RuntimeError for a version that is not known."""
    import xllamacpp

    found = sorted(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    if not found:
        raise RuntimeError("this platform's xllamacpp does not show llama.cpp's C functions (Windows)")
    library = ctypes.CDLL(str(found[0]))
    declare(
        library,
        ("llama_model_default_params", ModelSettings, []),
        ("llama_context_default_params", ContextSettings, []),
        ("llama_model_load_from_file", Pointer, [ctypes.c_char_p, ModelSettings]),
        ("llama_init_from_model", Pointer, [Pointer, ContextSettings]),
        ("llama_model_get_vocab", Pointer, [Pointer]),
        ("llama_vocab_n_tokens", Int, [Pointer]),
        ("llama_vocab_is_eog", Bool, [Pointer, Int]),
        ("llama_tokenize", Int, [Pointer, ctypes.c_char_p, Int, Pointer, Int, Bool, Bool]),
        ("llama_batch_init", LlamaBatch, [Int, Int, Int]),
        ("llama_decode", Int, [Pointer, LlamaBatch]),
        ("llama_get_logits_ith", ctypes.POINTER(Float), [Pointer, Int]),
        ("llama_batch_free", None, [LlamaBatch]),
        ("llama_free", None, [Pointer]),
        ("llama_get_memory", Pointer, [Pointer]),
        ("llama_memory_clear", None, [Pointer, Bool]),
        ("llama_adapter_lora_init", Pointer, [Pointer, ctypes.c_char_p]),
        ("llama_set_adapters_lora", Int, [Pointer, Pointer, ctypes.c_size_t, Pointer]),
        ("llama_backend_init", None, []),
    )
    check_defaults(library.llama_model_default_params(), KNOWN_MODEL)
    check_defaults(library.llama_context_default_params(), KNOWN_CONTEXT)
    return library


BATCH = 512
"""Tokens computed at once."""


class Session:
    """A model, its adapters, and a cache in float32 that grows with what is asked."""

    def __init__(self, opening: dict[str, Any]) -> None:
        self._library = open_library()
        self._library.llama_backend_init()
        self._threads, self._length, self._context = opening["threads"], 0, None
        settings = self._library.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.vocab_only = opening["vocab_only"]
        settings.use_extra_bufts = False  # repacked weights round otherwise
        self._model = self._library.llama_model_load_from_file(opening["model"].encode(), settings)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load this file")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.size = self._library.llama_vocab_n_tokens(self._vocabulary)
        self._adapters = (Pointer * len(opening["adapters"]))()
        self._scales = (Float * len(self._adapters))(*(scale for _, scale in opening["adapters"]))
        for index, (path, _) in enumerate(opening["adapters"]):
            self._adapters[index] = self._library.llama_adapter_lora_init(self._model, path.encode())
            if not self._adapters[index]:
                raise RuntimeError(f"llama.cpp cannot load the adapter {path}")
        tower = opening.get("tower")
        self._tower = LlamaTower(self._library, self._model, tower, self._threads) if tower else None

    def _start(self, length: int) -> None:
        """An empty cache for `length` tokens."""
        if self._context is not None and length <= self._length:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
            return
        if self._context is not None:
            self._library.llama_free(self._context)
        self._length = max(256, 1 << (length - 1).bit_length())
        settings = self._library.llama_context_default_params()
        settings.n_ctx = self._length
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_outputs_max = settings.n_outputs_max_per_seq = BATCH
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.flash_attn_type = 0
        settings.type_k = settings.type_v = F32
        self._context = self._library.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp cannot run this file")
        count = len(self._adapters)
        if count and self._library.llama_set_adapters_lora(self._context, self._adapters, count, self._scales):
            raise RuntimeError("llama.cpp refuses the adapters")

    def tokenize(self, task: dict[str, Any]) -> list[list[int]]:
        """Ids of each text."""
        return [self._ids(text.encode(), task["add_special"], task["parse_special"]) for text in task["texts"]]

    def _ids(self, text: bytes, add_special: bool, parse_special: bool) -> list[int]:
        room = (Int * (len(text) + 16))()
        count = self._library.llama_tokenize(
            self._vocabulary, text, len(text), room, len(room), add_special, parse_special
        )
        return list(room[:count])

    def _decode(self, tokens: list[int], first: int, all_logits: bool) -> np.ndarray:
        """Logits after each of at most BATCH tokens (or the last), (T, V)."""
        batch = self._library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, first + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = int(all_logits or index == len(tokens) - 1)
        failed = self._library.llama_decode(self._context, batch)
        self._library.llama_batch_free(batch)
        if failed:
            raise RuntimeError("llama.cpp cannot compute these tokens")
        wanted = range(len(tokens)) if all_logits else [len(tokens) - 1]
        rows = (self._library.llama_get_logits_ith(self._context, index) for index in wanted)
        return np.stack([np.ctypeslib.as_array(row, (self.size,)) for row in rows])

    def logits(self, task: dict[str, Any]) -> np.ndarray:
        """After each of the tokens, (T, V) float32."""
        tokens = task["tokens"]
        self._start(len(tokens))
        return np.concatenate([self._decode(tokens[i : i + BATCH], i, True) for i in range(0, len(tokens), BATCH)])

    def image_logits(self, task: dict[str, Any]) -> int:
        """Logits after each of the last `rows` tokens of `after`, behind `before` and a picture, into `array`; how many
        tokens the picture is. What its family puts around a picture stands in `before` and `after` already."""
        assert self._tower is not None
        chunks = self._tower.chunks(np.load(task["picture"]))
        before, after, rows = task["before"], task["after"], task["rows"]
        own = chunks.before, chunks.after
        length = chunks.length
        if (own[0] and before[-len(own[0]) :] != own[0]) or after[: len(own[1])] != own[1]:
            raise RuntimeError(f"llama.cpp puts the tokens {own[0]} and {own[1]} around a picture, training did not")
        self._start(len(before) + length + len(after))
        for start in range(0, len(before), BATCH):
            self._decode(before[start : start + BATCH], start, False)
        place = chunks.read(self._context, len(before), BATCH)
        chunks.close()
        read, learned = after[:-rows], after[-rows:]
        for start in range(0, len(read), BATCH):
            self._decode(read[start : start + BATCH], place + start, False)
        place += len(read)
        parts = [self._decode(learned[i : i + BATCH], place + i, True) for i in range(0, rows, BATCH)]
        np.save(task["array"], np.concatenate(parts))
        return length

    def generate(self, task: dict[str, Any]) -> dict[str, Any]:
        """The likeliest continuation, and whether it ended by itself."""
        tokens, answer, stops = task["tokens"], [], set(task["stop_tokens"])
        self._start(len(tokens) + task["max_tokens"])
        last = np.empty((1, self.size))
        for start in range(0, len(tokens), BATCH):
            last = self._decode(tokens[start : start + BATCH], start, False)
        for place in range(len(tokens), len(tokens) + task["max_tokens"]):
            token = int(last[0].argmax())
            if token in stops or self._library.llama_vocab_is_eog(self._vocabulary, token):
                return {"tokens": answer, "stopped": True}
            answer.append(token)
            last = self._decode([token], place, False)
        return {"tokens": answer, "stopped": False}


def main() -> None:
    """Answer one line of JSON with another until there is no more; arrays go to the file that the question names."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the part that reads pictures writes to stdout
    session = Session(json.loads(sys.stdin.readline()))
    kinds: dict[str, Callable[[dict[str, Any]], Any]] = {
        "tokenize": session.tokenize,
        "logits": session.logits,
        "image_logits": session.image_logits,
        "generate": session.generate,
    }
    print(json.dumps({"answer": session.size}), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        answer = kinds[task["kind"]](task)
        if isinstance(answer, np.ndarray):
            np.save(task["array"], answer)
            answer = None
        print(json.dumps({"answer": answer}), file=answers, flush=True)


if __name__ == "__main__":
    main()

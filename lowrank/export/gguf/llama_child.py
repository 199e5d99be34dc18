"""llama.cpp in a process of its own: run as a module, one line of JSON a question (see llama_cpp.py).

It talks to the C functions inside the wheel of xllamacpp. Their two structures of settings have changed often,
so the defaults that llama.cpp fills in are compared with what is known before anything is trusted. Nothing heavy
is imported, so that the process starts at once; llama.cpp may end it at any assertion.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

F32, Q8_0 = 0, 8
Pointer, Int, Unsigned, Float, Bool = (
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_uint32,
    ctypes.c_float,
    ctypes.c_bool,
)


ROOM = 256
"""Bytes behind the fields used here, for those that versions differ in: both structures go by value as the last
argument, larger than any register, so that more than there is does no harm on x86-64 and aarch64."""


class ModelSettings(ctypes.Structure):
    """llama_model_params of llama.h."""

    _fields_ = (
        ("devices", Pointer),
        ("tensor_buft_overrides", Pointer),
        ("n_gpu_layers", Int),
        ("split_mode", Int),
        ("load_mode", Int),
        ("lazy_mode", Int),
        ("main_gpu", Int),
        ("tensor_split", Pointer),
        ("progress_callback", Pointer),
        ("progress_callback_user_data", Pointer),
        ("kv_overrides", Pointer),
        *((name, Bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts")),
        ("rest", ctypes.c_uint8 * ROOM),
    )


class ContextSettings(ctypes.Structure):
    """llama_context_params of llama.h."""

    _fields_ = (
        *(
            (name, Unsigned)
            for name in (
                "n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq",
            )
        ),
        ("n_threads", Int),
        ("n_threads_batch", Int),
        *(
            (name, Int)
            for name in ("ctx_type", "rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type")
        ),
        *(
            (name, Float)
            for name in (
                "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast",
                "yarn_beta_slow",
            )
        ),
        ("yarn_orig_ctx", Unsigned),
        ("defrag_thold", Float),
        ("cb_eval", Pointer),
        ("cb_eval_user_data", Pointer),
        ("type_k", Int),
        ("type_v", Int),
        ("rest", ctypes.c_uint8 * ROOM),
    )  # fmt: skip


class Batch(ctypes.Structure):
    """llama_batch of llama.h."""

    _fields_ = (
        ("n_tokens", Int),
        ("token", ctypes.POINTER(Int)),
        ("embd", Pointer),
        ("pos", ctypes.POINTER(Int)),
        ("n_seq_id", ctypes.POINTER(Int)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(Int))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


KNOWN_MODEL = {"n_gpu_layers": -1, "split_mode": 1, "main_gpu": 0, "vocab_only": False, "use_extra_bufts": True}
KNOWN_CONTEXT = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_threads": 4, "rope_scaling_type": -1,
    "pooling_type": -1, "attention_type": -1, "flash_attn_type": -1, "yarn_ext_factor": -1.0, "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0, "defrag_thold": -1.0, "type_k": 1, "type_v": 1,
}  # fmt: skip
"""Defaults by which a version of llama.cpp whose structures lie otherwise is recognized."""


def open_library() -> Any:
    """The C functions, with their types. Raises RuntimeError for a version that is not known."""
    import xllamacpp

    found = sorted(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    if not found:
        raise RuntimeError("this platform's xllamacpp does not show llama.cpp's C functions (Windows)")
    library = ctypes.CDLL(str(found[0]))
    for name, result, arguments in (
        ("llama_model_default_params", ModelSettings, []),
        ("llama_context_default_params", ContextSettings, []),
        ("llama_model_load_from_file", Pointer, [ctypes.c_char_p, ModelSettings]),
        ("llama_init_from_model", Pointer, [Pointer, ContextSettings]),
        ("llama_model_get_vocab", Pointer, [Pointer]),
        ("llama_vocab_n_tokens", Int, [Pointer]),
        ("llama_vocab_is_eog", Bool, [Pointer, Int]),
        ("llama_tokenize", Int, [Pointer, ctypes.c_char_p, Int, Pointer, Int, Bool, Bool]),
        ("llama_batch_init", Batch, [Int, Int, Int]),
        ("llama_decode", Int, [Pointer, Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(Float), [Pointer, Int]),
        ("llama_batch_free", None, [Batch]),
        ("llama_free", None, [Pointer]),
        ("llama_get_memory", Pointer, [Pointer]),
        ("llama_memory_clear", None, [Pointer, Bool]),
        ("llama_adapter_lora_init", Pointer, [Pointer, ctypes.c_char_p]),
        ("llama_set_adapters_lora", Int, [Pointer, Pointer, ctypes.c_size_t, Pointer]),
        ("llama_backend_init", None, []),
    ):
        function = getattr(library, name, None)
        if function is None:
            raise RuntimeError(f"this xllamacpp has no {name}")
        function.restype, function.argtypes = result, arguments
    _check(library.llama_model_default_params(), KNOWN_MODEL)
    _check(library.llama_context_default_params(), KNOWN_CONTEXT)
    return library


def _check(settings: Any, known: dict[str, Any]) -> None:
    for name, value in known.items():
        if getattr(settings, name) != value:
            raise RuntimeError(
                f"this xllamacpp has other structures than lowrank knows ({name} is {getattr(settings, name)})"
            )


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
    session = Session(json.loads(sys.stdin.readline()))
    kinds: dict[str, Callable[[dict[str, Any]], Any]] = {
        "tokenize": session.tokenize,
        "logits": session.logits,
        "generate": session.generate,
    }
    print(json.dumps({"answer": session.size}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        answer = kinds[task["kind"]](task)
        if isinstance(answer, np.ndarray):
            np.save(task["array"], answer)
            answer = None
        print(json.dumps({"answer": answer}), flush=True)


if __name__ == "__main__":
    main()

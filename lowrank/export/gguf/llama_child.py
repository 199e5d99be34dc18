"""llama.cpp in a process of its own: run as a module with one request on standard input (see llama_cpp.py).

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
"""Defaults by which a version of llama.cpp whose structures lie otherwise is recognised."""


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


class Session:
    """A model, its adapters, and a cache in float32 for up to `length` tokens."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._library = open_library()
        self._library.llama_backend_init()
        self._length = request["length"]
        settings = self._library.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.vocab_only = self._length == 0
        settings.use_extra_bufts = False  # repacked weights round otherwise
        self._model = self._library.llama_model_load_from_file(request["model"].encode(), settings)
        if not self._model:
            raise RuntimeError("llama.cpp cannot load this file")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.size = self._library.llama_vocab_n_tokens(self._vocabulary)
        self._context = self._open_context(request) if self._length else None

    def _open_context(self, request: dict[str, Any]) -> Any:
        settings = self._library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = max(self._length, 64)
        settings.n_outputs_max = settings.n_outputs_max_per_seq = max(self._length, 64)
        settings.n_threads = settings.n_threads_batch = request["threads"]
        settings.flash_attn_type = 0
        settings.type_k = settings.type_v = F32
        context = self._library.llama_init_from_model(self._model, settings)
        if not context:
            raise RuntimeError("llama.cpp cannot run this file")
        if request["adapters"]:
            loaded = (Pointer * len(request["adapters"]))()
            scales = (Float * len(loaded))(*(scale for _, scale in request["adapters"]))
            for index, (path, _) in enumerate(request["adapters"]):
                loaded[index] = self._library.llama_adapter_lora_init(self._model, path.encode())
                if not loaded[index]:
                    raise RuntimeError(f"llama.cpp cannot load the adapter {path}")
            if self._library.llama_set_adapters_lora(context, loaded, len(loaded), scales):
                raise RuntimeError("llama.cpp refuses the adapters")
        return context

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
        """Logits after each token (or the last), (T, V)."""
        batch = self._library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, first + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = int(all_logits or index == len(tokens) - 1)
        if self._library.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp cannot compute these tokens")
        wanted = range(len(tokens)) if all_logits else [len(tokens) - 1]
        rows = [
            np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._context, i), (self.size,)) for i in wanted
        ]
        return np.stack(rows)

    def _forget(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def logits(self, task: dict[str, Any]) -> np.ndarray:
        """After each of the tokens, (T, V) float32."""
        self._forget()
        return self._decode(task["tokens"], 0, all_logits=True)

    def generate(self, task: dict[str, Any]) -> dict[str, Any]:
        """The likeliest continuation, and whether it ended by itself."""
        self._forget()
        tokens, answer = task["tokens"], []
        done = 0
        while len(answer) < task["max_tokens"]:
            token = int(self._decode(tokens, done, all_logits=False)[0].argmax())
            done += len(tokens)
            if self._library.llama_vocab_is_eog(self._vocabulary, token):
                return {"tokens": answer, "stopped": True}
            answer.append(token)
            tokens = [token]
        return {"tokens": answer, "stopped": False}


def main() -> None:
    """Answer the request: arrays and everything else to one .npz file."""
    request = json.load(sys.stdin)
    session = Session(request)
    kinds: dict[str, Callable[[dict[str, Any]], Any]] = {
        "tokenize": session.tokenize,
        "logits": session.logits,
        "generate": session.generate,
    }
    arrays: dict[str, np.ndarray] = {}
    said: dict[str, Any] = {}
    for index, task in enumerate(request["tasks"]):
        answer = kinds[task["kind"]](task)
        if isinstance(answer, np.ndarray):
            arrays[str(index)] = answer
        else:
            said[str(index)] = answer
    arrays["said"] = np.frombuffer(json.dumps(said).encode(), dtype=np.uint8)
    np.savez(request["answers"], **arrays)


if __name__ == "__main__":
    main()

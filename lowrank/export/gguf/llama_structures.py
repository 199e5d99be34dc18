"""llama.cpp's structures of settings, as ctypes sees them, and how a version whose structures lie otherwise is noticed.

They have changed often, so the defaults that the library fills in are compared with what is known before anything is
trusted.
"""

from __future__ import annotations

import ctypes
from typing import Any

Pointer, Int, Unsigned, Float, Bool = (
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_uint32,
    ctypes.c_float,
    ctypes.c_bool,
)


OTHER_VERSION = "this xllamacpp has"
"""How the errors below begin."""
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


class LlamaBatch(ctypes.Structure):
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


def declare(library: Any, *functions: tuple[str, Any, list[Any]]) -> None:
    """Give C functions their types, `(name, result, arguments)`. Raises RuntimeError for one that is not there."""
    for name, result, arguments in functions:
        function = getattr(library, name, None)
        if function is None:
            raise RuntimeError(f"{OTHER_VERSION} no {name}")
        function.restype, function.argtypes = result, arguments


def check_defaults(settings: Any, known: dict[str, Any]) -> None:
    """Raises RuntimeError where the library's own settings are not those that are known."""
    for name, value in known.items():
        if getattr(settings, name) != value:
            raise RuntimeError(
                f"{OTHER_VERSION} other structures than lowrank knows ({name} is {getattr(settings, name)})"
            )

"""vLLM loaded, and the few things of it that are used."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowrank.errors import ModelError
from lowrank.generate.request import GenerationConfig
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import locate
from lowrank.serve.vllm_engine.child_watch import child_ids, watch_children


@dataclass(frozen=True)
class Vllm:
    """What is used of vLLM: an engine, and how to say what it is asked."""

    llm: Any
    """`vllm.v1.engine.async_llm.AsyncLLM`"""
    sampling: Callable[..., Any]
    """`vllm.SamplingParams` with `output_kind=RequestOutputKind.DELTA`"""
    form: Callable[[GenerationConfig], Any]
    """`StructuredOutputsParams` of a JSON schema or a grammar."""
    lora: Callable[[str, int, str], Any]
    """`LoRARequest` of a name, a number and a path."""
    watch: subprocess.Popen[bytes] | None = None
    """Ends the engine's processes with ours."""


def open_vllm(model: ModelConfig, *, max_num_seqs: int, max_loras: int, max_rank: int) -> Vllm:
    """Load `model` on the GPU. Raises ModelError where vLLM is not installed."""
    try:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        message = f"--engine vllm needs {error.name}: pip install 'lowrank-llm[serve,vllm]' (Linux and a GPU)"
        raise ModelError(message) from error
    arguments = AsyncEngineArgs(
        model=locate(model.path),
        revision=model.revision,
        dtype=model.dtype,
        enable_lora=True,
        max_loras=max_loras + 1,  # with all of them in one batch vLLM has no row left that means "none"
        max_lora_rank=max_rank,
        max_num_seqs=max_num_seqs,
        disable_log_stats=True,
        structured_outputs_config={"backend": "guidance"},  # llguidance, as everywhere here
    )
    others = child_ids()
    return Vllm(
        llm=AsyncLLM.from_engine_args(arguments),
        sampling=lambda **options: SamplingParams(**options, output_kind=RequestOutputKind.DELTA),
        form=lambda config: (
            StructuredOutputsParams(json=config.json_schema)
            if config.grammar is None
            else StructuredOutputsParams(grammar=config.grammar)
        ),
        lora=LoRARequest,
        watch=watch_children(others),
    )

"""Writes fixtures/llama_model_quantize.json: what llama.cpp's own quantizer makes of small made files, as hashes.

Run in an environment that has llama-cpp-python (a compiler is needed; xllamacpp has no quantizer), numpy and gguf:

    python tests/export/gguf/make_quantized_fixtures.py     # llama-cpp-python 0.3.36

The files are made of numpy's random numbers, so that the tests can make them again.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

FIXTURE = Path(__file__).parent / "fixtures" / "llama_model_quantize.json"
RECIPES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S",
    "Q5_K_M", "Q6_K", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
"""All but those that need an importance matrix, which llama.cpp takes as a C++ object only."""
MODELS: dict[str, dict[str, int]] = {
    "dense": {"width": 256, "inner": 512, "layers": 8, "experts": 0},
    "no multiple of 256": {"width": 192, "inner": 256, "layers": 4, "experts": 0},
    "experts": {"width": 256, "inner": 256, "layers": 4, "experts": 8},
}


def write_model(path: Path, width: int, inner: int, layers: int, experts: int) -> None:
    """A GGUF file in float32 with the header of a Llama (or Mixtral) of this size."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32) * np.float32(0.05))

    add("token_embd.weight", 64, width)
    for layer in range(layers):
        for name, rows in (("attn_q", width), ("attn_k", width // 4), ("attn_v", width // 4), ("attn_output", width)):
            add(f"blk.{layer}.{name}.weight", rows, width)
        add(f"blk.{layer}.attn_norm.weight", width)
        add(f"blk.{layer}.ffn_norm.weight", width)
        many = (experts,) if experts else ()
        end = "_exps" if experts else ""
        if experts:
            add(f"blk.{layer}.ffn_gate_inp.weight", experts, width)
        add(f"blk.{layer}.ffn_gate{end}.weight", *many, inner, width)
        add(f"blk.{layer}.ffn_up{end}.weight", *many, inner, width)
        add(f"blk.{layer}.ffn_down{end}.weight", *many, width, inner)
    add("output_norm.weight", width)
    add("output.weight", 64, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def digest(path: Path) -> str:
    """Of the names, types and bytes of all tensors."""
    found = hashlib.sha256()
    tensors: list[Any] = gguf.GGUFReader(path).tensors
    for tensor in sorted(tensors, key=lambda each: each.name):
        found.update(f"{tensor.name} {tensor.tensor_type.name} {list(map(int, tensor.shape))}\n".encode())
        found.update(np.ascontiguousarray(tensor.data).tobytes())
    return found.hexdigest()


def main() -> None:
    import llama_cpp

    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        for model, shape in MODELS.items():
            source, target = Path(name, "source.gguf"), Path(name, "target.gguf")
            write_model(source, **shape)
            found[model] = {"source": digest(source)}
            for recipe in RECIPES:
                settings = llama_cpp.llama_model_quantize_default_params()
                settings.ftype = int(gguf.LlamaFileType[f"MOSTLY_{recipe}"])
                settings.nthread = 1
                code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings)
                assert code == 0, (model, recipe, code)
                found[model][recipe] = digest(target)
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

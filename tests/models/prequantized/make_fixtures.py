"""Writes fixtures/: linears packed by the tools themselves, each with the weight the tool itself unpacks.

Run once for each tool, in an environment that has it (they pin torch versions that exclude one another):

    python tests/models/prequantized/make_fixtures.py gptqmodel     # 7.7.0, with GPTQMODEL_CPU_WORKERS=2
    python tests/models/prequantized/make_fixtures.py compressed    # compressed-tensors 0.20
    python tests/models/prequantized/make_fixtures.py aqlm          # 1.1.7
    python tests/models/prequantized/make_fixtures.py torchao       # 0.18
    python tests/models/prequantized/make_fixtures.py hqq           # 0.2.8
    python tests/models/prequantized/make_fixtures.py fp8           # transformers 5.23

eetq_8 and ../eetq_quantized come from EETQ's own csrc/cutlass_kernels/cutlass_preprocessors.cc (commit 465e972), whose
functions run on a CPU when compiled alone: `symmetric_quantize` of a (D, O) matrix, with the `LayoutDetails` that
mixed_gemm_B_layout.h gives int8 from Turing on (column major, 64 rows a tile, 2 columns interleaved, rows permuted).

A file holds `tensors` under their names in a checkpoint, `dense` (what the tool unpacks), and in its metadata the
`quantization_config`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "fixtures"
ROWS, COLUMNS = 64, 128


def save(name: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], dense: torch.Tensor) -> None:
    """Write one fixture."""
    FOLDER.mkdir(exist_ok=True)
    everything = {key: tensor.detach().clone().contiguous() for key, tensor in {**tensors, "dense": dense}.items()}
    save_file(everything, FOLDER / f"{name}.safetensors", {"quantization_config": json.dumps(config)})
    print(name, {key: tuple(tensor.shape) for key, tensor in tensors.items()})


def linear() -> torch.nn.Linear:
    """The same weights for every tool, with an outlier."""
    torch.manual_seed(0)
    made = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    made.weight.data = torch.randn(ROWS, COLUMNS) * 0.02
    made.weight.data[3, 5] = 0.5
    return made


def _affine(weight_OD: torch.Tensor, bits: int, size: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Round-to-nearest scale and zero point (O, G), as any calibration would hand them to a packer."""
    grouped = weight_OD.view(weight_OD.shape[0], -1, size)
    if symmetric:
        scale = grouped.abs().amax(-1) * 2 / (2**bits - 1)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    least = grouped.amin(-1).clamp(max=0)
    scale = (grouped.amax(-1).clamp(min=0) - least) / (2**bits - 1)
    return scale, torch.round(-least / scale).clamp(0, 2**bits - 1)


def gptqmodel() -> None:
    """GPTQ 2, 3, 4, 8 bits, version 1 and 2, ordered by activation; AWQ 4 bits."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    for bits in (2, 3, 4, 8):
        for symmetric, ordered, version in ((True, False, "gptq"), (False, True, "gptq"), (False, False, "gptq_v2")):
            base, size = linear(), 32
            module = TorchLinear(
                bits=bits, group_size=size, sym=symmetric, desc_act=ordered, in_features=COLUMNS, out_features=ROWS,
                bias=False, pack_dtype=torch.int32, register_buffers=True,
            )  # fmt: skip
            order = torch.randperm(COLUMNS) if ordered else torch.arange(COLUMNS)
            g_idx = torch.empty(COLUMNS, dtype=torch.int32)
            g_idx[order] = (torch.arange(COLUMNS) // size).to(torch.int32)
            scale, zero = _affine(base.weight.data[:, order], bits, size, symmetric)
            module.pack_original(base, scale, zero, g_idx)
            module.post_init()
            dense = module.dequantize_weight().t()
            if version == "gptq":
                from gptqmodel.quantization.config import QuantizeConfig

                config = QuantizeConfig(bits=bits, group_size=size, sym=symmetric, desc_act=ordered)
                convert_gptq_v2_to_v1_format_module(module, config)
            config = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric}
            config |= {"desc_act": ordered, "checkpoint_format": version}
            tensors = {key: getattr(module, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
            kind = "sym" if symmetric else "ordered" if ordered else "v2"
            save(f"gptq_{bits}_{kind}", config, tensors, dense)
    base = linear()
    scale, zero = _affine(base.weight.data, 4, 32, False)
    awq = AwqTorchLinear(
        bits=4, group_size=32, sym=False, desc_act=False, in_features=COLUMNS, out_features=ROWS, register_buffers=True
    )
    awq.pack(base, scale.half(), zero)
    dense = awq._dequantize_weight_for_inference(torch.zeros(1, COLUMNS).half(), dtype=torch.float16).t()
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    save("awq_4", config, {key: getattr(awq, key) for key in ("qweight", "qzeros", "scales")}, dense)


def compressed() -> None:
    """compressed-tensors: packed integers, plain 8-bit integers, 8-bit floats."""
    from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "packed_4_sym": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}),
        "packed_4_asym": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
        "packed_3_sym": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": True}),
        "packed_8_channel": ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
        "int_8_channel": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
        "int_8_asym": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        "int_8_tensor": ("naive-quantized", {"num_bits": 8, "strategy": "tensor", "symmetric": True}),
        "float_8_channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "float_8_tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        "float_8_block": (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
        ),
    }
    for name, (layout, arguments) in cases.items():
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        weight = linear().weight.data.to(torch.bfloat16)
        view = weight.float()
        if arguments["strategy"] == "group":
            view = view.view(ROWS, -1, 32)
            least, greatest = view.amin(-1), view.amax(-1)
        elif arguments["strategy"] == "channel":
            least, greatest = view.amin(-1, keepdim=True), view.amax(-1, keepdim=True)
        elif arguments["strategy"] == "block":
            view = view.view(2, 32, 4, 32)
            least, greatest = view.amin((1, 3)), view.amax((1, 3))
        else:
            least, greatest = view.amin().view(1), view.amax().view(1)
        scale, zero = calculate_qparams(least, greatest, scheme.weights)
        state = {"weight": weight, "weight_scale": scale.to(torch.bfloat16), "weight_zero_point": zero}
        packer = PackedQuantizationCompressor if layout == "pack-quantized" else NaiveQuantizationCompressor
        tensors = packer.compress(state, scheme)
        dense = packer.decompress(tensors, scheme)["weight"]
        group = {"targets": ["Linear"], "weights": arguments, "format": layout}
        if layout in ("int-quantized", "float-quantized"):
            group["input_activations"] = {"num_bits": 8, "strategy": "token", "dynamic": True}
        config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
        save(f"compressed_{name}", config, tensors, dense)


def aqlm() -> None:
    """AQLM 1x16 would carry a codebook of 1 MB; 1 and 2 codebooks of fewer bits have the same layout."""
    from aqlm.inference import QuantizedLinear
    from aqlm.utils import _dequantize_weight, pack_int_data, unpack_int_data

    torch.manual_seed(0)
    for books, bits in ((1, 10), (2, 8)):
        layer = QuantizedLinear(COLUMNS, ROWS, 8, 1, books, bits, bias=False, dtype=torch.float16)
        layer.codebooks.data = torch.randn_like(layer.codebooks.float()).half() * 0.02
        layer.scales.data = (torch.rand(ROWS, 1, 1, 1) + 0.5).half()
        layer.codes.data = pack_int_data(torch.randint(0, 2**bits, layer.codes.shape), bits)
        dense = _dequantize_weight(unpack_int_data(layer.codes, bits), layer.codebooks.float(), layer.scales.float())
        config = {"quant_method": "aqlm", "num_codebooks": books, "nbits_per_codebook": bits}
        tensors = {key: getattr(layer, key) for key in ("codes", "codebooks", "scales")}
        save(f"aqlm_{books}x{bits}", config | {"in_group_size": 8, "out_group_size": 1}, tensors, dense)


def torchao() -> None:
    """Int8WeightOnlyConfig version 2, per row and per group."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow, quantize_
    from transformers import TorchAoConfig

    for name, granularity in (("row", PerRow()), ("group", PerGroup(32))):
        model = torch.nn.Sequential(linear()).to(torch.bfloat16)
        kind = Int8WeightOnlyConfig(granularity=granularity)
        quantize_(model, kind)
        weight = model[0].weight
        tensors, _ = flatten_tensor_state_dict({"0.weight": weight.data})
        config = json.loads(json.dumps(TorchAoConfig(kind).to_dict(), default=lambda value: value.value))
        save(f"torchao_{name}", config, {k.removeprefix("0."): v for k, v in tensors.items()}, weight.dequantize())


def hqq() -> None:
    """HQQLinear's own state, encoded for safetensors."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for bits in (8, 4, 3, 2, 1):
        config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        layer = HQQLinear(linear(), config, compute_dtype=torch.float16, device="cpu")
        tensors = {k: v for k, v in layer.state_dict().items() if isinstance(v, torch.Tensor)}
        described = {"quant_method": "hqq", "quant_config": config, "skip_modules": ["lm_head"]}
        save(f"hqq_{bits}", described, tensors, layer.dequantize())


def fp8() -> None:
    """transformers' own fine-grained fp8, in blocks of 32 x 48 so that the last block is cut."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    weight, block = linear().weight.data, (32, 48)
    scale = torch.empty(2, 3)
    for p in range(2):
        for q in range(3):
            scale[p, q] = weight[p * 32 : (p + 1) * 32, q * 48 : (q + 1) * 48].abs().max() / 448
    whole = scale.repeat_interleave(32, 0).repeat_interleave(48, 1)[:, :COLUMNS]
    tensors = {"weight": (weight / whole).to(torch.float8_e4m3fn), "weight_scale_inv": scale}
    dense = _dequantize_fp8_weight(tensors["weight"], scale, list(block), torch.float32)
    save("fp8_block", {"quant_method": "fp8", "weight_block_size": list(block), "fmt": "e4m3"}, tensors, dense)


if __name__ == "__main__":
    {f.__name__: f for f in (gptqmodel, compressed, aqlm, torchao, hqq, fp8)}[sys.argv[1]]()

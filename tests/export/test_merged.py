"""Merged models compute what base + adapter computes. Oracles: the update added by hand, and PEFT's own merge."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank.adapters.variants import ia3, lora
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import AdapterOnDisk, load_adapter, save_adapter
from lowrank.errors import ModelError
from lowrank.export.merge.merged import Merged
from lowrank.export.merge.tensor_names import model_without_memory
from lowrank.export.writing.sizes import parse_size
from lowrank.models.loading.checkpoint_files import CheckpointFiles
from tests.adapters.peft_twins import TOKEN as TWIN_TOKEN
from tests.adapters.peft_twins import VARIANTS, config_of, logits, moved, new_bank, on_disk
from tests.checkpoints.test_peft_layout import CONFIGS, TOKEN, merged_logits
from tests.export.sources import load, make_source, source_of, write_merged
from tests.tiny_models import FAMILIES


@pytest.fixture(autouse=True)
def _peft_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        yield


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    source = make_source(tmp_path, lora.LoraConfig(rank=2), family)
    assert source.adapter is not None
    expected = merged_logits(load(source.base), source.adapter)
    got = load(write_merged(source, tmp_path / "out"))(TOKEN).logits
    assert (load(source.base)(TOKEN).logits - expected).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CONFIGS)
def test_every_kind_of_target(case: str, tied: bool, tmp_path: Path) -> None:
    """Patterns, rsLoRA, embedding, head, copies; a tied pair of which one end changes becomes two tensors."""
    source = make_source(tmp_path, CONFIGS[case], tie_word_embeddings=tied)
    assert source.adapter is not None
    expected = merged_logits(load(source.base), source.adapter)
    out = write_merged(source, tmp_path / "out")
    torch.testing.assert_close(load(out)(TOKEN).logits, expected, rtol=1e-10, atol=1e-10)
    untied = tied and case in ("head", "embedding", "copies")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == (tied and not untied)
    assert ("lm_head.weight" in tensors_in(out)) == (not tied or untied)


@pytest.mark.parametrize("family", ["gpt2", "falcon", "gemma2", "opt"])
def test_other_families_untie(family: str, tmp_path: Path) -> None:
    source = make_source(tmp_path, lora.LoraConfig(rank=2, target_modules=("lm_head",)), family)
    assert source.adapter is not None
    expected = merged_logits(load(source.base), source.adapter)
    torch.testing.assert_close(load(write_merged(source, tmp_path / "out"))(TOKEN).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equals_peft_bit_for_bit_in_bfloat16(family: str, tmp_path: Path) -> None:
    """PEFT's merge of the float32 weights, rounded once; bfloat16 weights are merged in float32, not in bfloat16."""
    source = make_source(tmp_path, lora.LoraConfig(rank=4), family, torch.bfloat16)
    assert source.adapter is not None
    source = replace(source, adapter=replace(source.adapter, tensors=_halved(source.adapter.tensors)))
    assert source.adapter is not None
    save_adapter(tmp_path / "adapter", source.adapter, describe_base(load(source.base), str(source.base)))
    oracle: Any = peft.PeftModel.from_pretrained(load(source.base, torch.float32), str(tmp_path / "adapter"))
    oracle = oracle.merge_and_unload()
    got = load(write_merged(source, tmp_path / "out"), torch.bfloat16).state_dict()
    for name, value in oracle.state_dict().items():
        assert torch.equal(got[name], value.to(torch.bfloat16)), name


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_fused_experts(family: str, shards: str, tmp_path: Path) -> None:
    """Adapters on `gate_up_proj` and `down_proj`, merged into files where experts are apart or fused. The oracle is the
    bank, which tests/adapters/test_experts.py holds against PEFT."""
    both = ("experts.gate_up_proj", "experts.down_proj")
    config = lora.LoraConfig(rank=2, alpha=6, target_modules=("o_proj",), target_parameters=both)
    bank = new_bank(family)
    slot = bank.add(config, seed=0)
    moved(bank, slot)
    source = replace(make_source(tmp_path, None, family), adapter=on_disk(bank, slot))
    out = write_merged(source, tmp_path / "out", max_shard_size=shards)
    torch.testing.assert_close(load(out)(TWIN_TOKEN).logits, logits(bank, slot), rtol=1e-9, atol=1e-9)
    assert tensors_in(out).keys() == tensors_in(source.base).keys()


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"loftq"}))
def test_every_variant_from_its_files(variant: str, tmp_path: Path) -> None:
    """What is on disk is all there is: DoRA's norms and VeRA's projections have to come back."""
    bank = new_bank()
    slot = bank.add(config_of(variant), seed=0)
    moved(bank, slot)
    save_adapter(tmp_path / "adapter", on_disk(bank, slot), describe_base(bank.base.model, "llama"))
    source = replace(make_source(tmp_path, None), adapter=load_adapter(tmp_path / "adapter"))
    got = load(write_merged(source, tmp_path / "out"))(TWIN_TOKEN).logits
    assert (load(source.base)(TWIN_TOKEN).logits - got).abs().max() > 1e-3
    torch.testing.assert_close(got, logits(bank, slot), rtol=1e-6, atol=1e-6)


def _halved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items()}


def test_shards_index_and_untouched_bytes(tmp_path: Path) -> None:
    config = lora.LoraConfig(rank=2, target_modules=("q_proj",))
    source = make_source(tmp_path, config, dtype=torch.float32)
    out = write_merged(source, tmp_path / "out", max_shard_size="20KB")
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    before, after = tensors_in(source.base), tensors_in(out)
    assert after.keys() == before.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in after.values())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name}
    assert all(file.stat().st_size < 30_000 for file in out.glob("*.safetensors") if "embed" not in file.name)
    again = write_merged(source_of(out, None), tmp_path / "again")  # a base of several files is read too
    assert all(torch.equal(value, after[name]) for name, value in tensors_in(again).items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    source = make_source(tmp_path, lora.LoraConfig(rank=2), dtype=torch.float32)
    out = write_merged(source, tmp_path / "out", dtype=dtype)
    assert {str(value.dtype) for value in tensors_in(out).values()} == {f"torch.{dtype}"}
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    whole = Merged(source)
    for name, value in tensors_in(out).items():
        assert torch.equal(whole.tensor(name, getattr(torch, dtype)), value)


def test_no_overflow_in_float16(tmp_path: Path) -> None:
    source = make_source(tmp_path, None, dtype=torch.float32)
    tensors = tensors_in(source.base)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, source.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight: has values above 65504"):
        write_merged(source, tmp_path / "out", dtype="float16")


def test_config_keys_tokenizer_and_template_stay(tmp_path: Path) -> None:
    source = make_source(tmp_path, lora.LoraConfig(rank=2, target_modules=("lm_head",)), tie_word_embeddings=True)
    config = json.loads((source.base / "config.json").read_text())
    config["rope_theta"], config["torch_dtype"], config["theirs"] = 12345.0, config.pop("dtype"), {"a": 1}
    (source.base / "config.json").write_text(json.dumps(config))
    (source.base / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.6}')
    (source.base / "tokenizer.json").write_bytes(b'{"odd":  "spacing"}')
    (source.base / "tokenizer_config.json").write_text('{"chat_template": "old", "eos_token": "</s>"}')
    (source.base / "LICENSE").write_text("theirs")
    (source.base / "pytorch_model.bin").write_bytes(b"not copied")
    source = replace(source, chat_template="new {{ x }}", stop_tokens=frozenset({2, 9}))
    out = write_merged(source, tmp_path / "out", dtype="bfloat16")
    written = json.loads((out / "config.json").read_text())
    assert written == {**config, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [2, 9], "temperature": 0.6}
    assert (out / "tokenizer.json").read_bytes() == b'{"odd":  "spacing"}'
    assert (out / "chat_template.jinja").read_text() == "new {{ x }}"
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == "new {{ x }}"
    assert (out / "LICENSE").is_file()
    assert not (out / "pytorch_model.bin").exists()


# ---- what cannot be merged ---------------------------------------------------------------------------------------


def test_adapter_of_another_base_lists_shapes(tmp_path: Path) -> None:
    source = make_source(tmp_path, lora.LoraConfig(rank=2, target_modules=("q_proj", "v_proj")))
    other = make_source(tmp_path / "other", None, hidden_size=64, intermediate_size=80)
    wrong = source_of(other.base, source.adapter)
    with pytest.raises(ModelError) as refused:
        Merged(wrong)
    text = str(refused.value)
    assert "q_proj.lora_A.weight: (2, 32) in the adapter, (32, 64) in the base" in text
    assert text.count("\n") >= 4
    deeper = make_source(tmp_path / "deep", lora.LoraConfig(rank=2), num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.self_attn\.q_proj\.weight: the base has no such tensor"):
        Merged(source_of(source.base, deeper.adapter))


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_biases_that_an_adapter_scales(family: str, tmp_path: Path) -> None:
    """(IA)^3 scales outputs, the bias among them."""
    config = ia3.IA3Config(target_modules=("q_proj", "v_proj"))
    source = make_source(tmp_path, config, family, torch.float32)
    assert source.adapter is not None
    model = load(source.base, torch.float32)
    rows = {module: model.get_submodule(module).out_features for module in source.adapter.targets}
    factors = {f"{module}.ia3_l": torch.rand(count, 1) + 0.5 for module, count in rows.items()}
    source = replace(source, adapter=replace(source.adapter, tensors=factors))
    assert source.adapter is not None
    for module in source.adapter.targets:
        factor = factors[f"{module}.ia3_l"]
        linear = model.get_submodule(module)
        assert linear.bias is not None
        linear.weight.mul_(factor)
        linear.bias.mul_(factor.flatten())
    with torch.no_grad():
        torch.testing.assert_close(
            load(write_merged(source, tmp_path / "out"), torch.float32)(TOKEN).logits, model(TOKEN).logits
        )


def test_an_adapter_of_other_experts_lists_shapes(tmp_path: Path) -> None:
    source = make_source(tmp_path, lora.LoraConfig(rank=2, target_modules=("q_proj",)), "mixtral", torch.float32)
    assert source.adapter is not None
    name = "model.layers.0.mlp.experts.down_proj"
    config = source.adapter.config.model_copy(update={"target_parameters": (name,)})
    wrong = {f"{name}.lora_A.weight": torch.ones(8, 40), f"{name}.lora_B.weight": torch.ones(32, 8)}
    adapter = AdapterOnDisk(config, {**source.adapter.tensors, **wrong}, {**source.adapter.targets, name: (2, 4.0)})
    described = r"A \(8, 40\) and B \(32, 8\) in the adapter, 4 experts of \(32, 48\) in the base"
    with pytest.raises(ModelError, match=described):
        Merged(replace(source, adapter=adapter))


def test_resized_vocabulary(tmp_path: Path) -> None:
    source = make_source(tmp_path, lora.LoraConfig(rank=2, modules_to_save=("lm_head", "embed_tokens")))
    smaller = make_source(tmp_path / "small", None, vocab_size=90)
    with pytest.raises(ModelError, match=r"lm_head\.weight: \(97, 32\) in the adapter, \(90, 32\) in the base"):
        Merged(source_of(smaller.base, source.adapter))


def test_missing_and_damaged_files_are_all_named(tmp_path: Path) -> None:
    source = make_source(tmp_path, None, dtype=torch.float32)
    base = write_merged(source, tmp_path / "sharded", max_shard_size="20KB")
    files = sorted(base.glob("*.safetensors"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-100])
    files[2].write_bytes(b"rubbish" * 9)
    with pytest.raises(ModelError) as refused:
        CheckpointFiles(base)
    text = str(refused.value)
    assert re.search(rf"{files[0].name}: \d+ tensors lie in it", text)
    assert f"{files[1]}: it ends at byte" in text
    assert f"{files[2]}: it has no safetensors header" in text


def test_pickles_and_unknown_quantizations_are_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path, lora.LoraConfig(rank=2))
    config = json.loads((source.base / "config.json").read_text())
    (source.base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "spqr"}}))
    with pytest.raises(ModelError, match=r"quant_method is 'spqr', which lowrank cannot read"):
        Merged(source)
    (source.base / "model.safetensors").rename(source.base / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, pickles"):
        CheckpointFiles(source.base)


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "500MB", "1GiB", "20kb", "7")] == [
        5 * 10**9,
        5 * 10**8,
        2**30,
        20000,
        7,
    ]
    for wrong in ("", "GB", "5XB", "-1GB", "0"):
        with pytest.raises(ValueError, match="expected a size"):
            parse_size(wrong)


# ---- memory ------------------------------------------------------------------------------------------------------

_CHILD = """
import sys
from pathlib import Path
from lowrank.checkpoints.peft_layout import load_adapter
from lowrank.export.source import Source
from lowrank.export.targets.merged import MergedExportConfig
from lowrank.models.config import ModelConfig
folder = Path(sys.argv[1])
model = ModelConfig(path=str(folder / "base"))
source = Source("mine", folder / "base", model, load_adapter(folder / "adapter"), None, None)
target = MergedExportConfig().build()
target.needs(source)
(folder / "out").mkdir()
target.write(source, folder / "out", lambda done, total, what="": None)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_stays_flat(tmp_path: Path) -> None:
    """A model of 0.4 GB, of which the largest tensor has 67 MB: the peak, Python and torch included, is below
    4 x 67 + 500 MB."""
    source = make_source(
        tmp_path, lora.LoraConfig(rank=2, target_modules=("q_proj", "down_proj")), dtype=torch.bfloat16,
        hidden_size=64, intermediate_size=64,
    )  # fmt: skip
    config = json.loads((source.base / "config.json").read_text())
    largest = 1024 * 32768
    config |= {"hidden_size": 1024, "intermediate_size": 32768, "num_hidden_layers": 2, "head_dim": 8}
    (source.base / "config.json").write_text(json.dumps(config))
    _grow(source.base)
    _save_adapter_for(source.base, tmp_path / "adapter")
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert size > 4e8
    assert int(done.stdout) * 1024 <= 4 * largest * 2 + 500e6


def _grow(base: Path) -> None:
    """Weights of the shapes that the configuration now asks for."""
    shapes = {name: tuple(value.shape) for name, value in model_without_memory(base).state_dict().items()}
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )


def _save_adapter_for(base: Path, folder: Path) -> None:
    model = model_without_memory(base)
    names = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "down_proj"))]
    tensors = {}
    for name in names:
        height, width = model.get_submodule(name).weight.shape
        tensors |= {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(height, 2)}
    adapter = AdapterOnDisk(lora.LoraConfig(rank=2, alpha=2), tensors, dict.fromkeys(names, (2, 2.0)))
    save_adapter(folder, adapter, describe_base(model, str(base)))

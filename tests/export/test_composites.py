"""Models with towers for pictures or sound, tuned on text, in the forms that others run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.errors import ModelError
from lowrank.export.gguf.adapter import write_adapter_file
from lowrank.export.gguf.convert import convert, plan, write_plan
from lowrank.export.gguf.llama_cpp import LlamaCpp, squared_error
from lowrank.export.gguf.model import read_folder, read_merged
from lowrank.export.gguf.upstream import SCRIPT
from lowrank.export.source import Source
from lowrank.export.targets.awq import AWQExportConfig
from lowrank.export.targets.gguf import GGUFExportConfig
from lowrank.export.targets.gptq import GPTQExportConfig
from lowrank.export.targets.lora_gguf import LoraGGUFExportConfig
from lowrank.export.targets.merged_4bit import Merged4bitExportConfig
from lowrank.export.verify.readers import read_model
from lowrank.models.layers import is_outside, language_model
from lowrank.models.loading.quiet import quiet_transformers
from tests.checkpoints.test_peft_layout import merged_logits, random_adapter
from tests.data.made_tokenizers import tokenizer_of
from tests.export.sources import source_of, write_merged
from tests.tiny_composites import COMPOSITES, save_composite_folder

REPRESENTATIVE = ("qwen3_5", "llava", "gemma3", "mistral3", "qwen2_audio")
TOKENS = list(range(3, 40))
_SLOW = ("idefics3", "qwen2_vl")


def loaded(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    with quiet_transformers():
        model = transformers.AutoModelForMultimodalLM.from_pretrained(folder, dtype=dtype)
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # grouped expert kernels know no float64
    return model.eval().requires_grad_(False)


def make_source(folder: Path, family: str, **text: Any) -> Source:
    base = save_composite_folder(folder / "base", family, **text)
    return source_of(base, random_adapter(loaded(base), LoraConfig(rank=2)))


@pytest.mark.parametrize(
    "family",
    [
        family if family in REPRESENTATIVE else pytest.param(family, marks=pytest.mark.slow)
        for family in COMPOSITES
        if family != "llama4"  # transformers 5.24 fails without a picture
    ],
)
def test_merged_keeps_the_tower_byte_for_byte(family: str, tmp_path: Path) -> None:
    source = make_source(tmp_path, family)
    assert source.adapter is not None
    out = write_merged(source, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (source.base, out))
    assert after.keys() == before.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == len(source.adapter.targets)
    assert not [name for name in changed if any(part in name for part in ("vision", "visual", "audio", "projector"))]
    assert (out / "preprocessor_config.json").read_bytes() == (source.base / "preprocessor_config.json").read_bytes()
    wanted = merged_logits(loaded(source.base), source.adapter)
    torch.testing.assert_close(loaded(out)(_TOKEN).logits, wanted, rtol=0, atol=1e-4)
    assert (loaded(source.base)(_TOKEN).logits - wanted).abs().max() > 1e-2


_TOKEN = torch.tensor([[5, 9, 11, 3, 8], [7, 7, 4, 60, 90]])


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gemma3", Merged4bitExportConfig(calibrate=False)),
        ("llava", GPTQExportConfig(calibrate=False)),
        ("qwen2_5_vl", AWQExportConfig(calibrate=False)),
    ],
)
def test_packed_forms_leave_the_tower_in_its_bits(family: str, config: Any, tmp_path: Path) -> None:
    source = make_source(tmp_path, family)
    target = config.build()
    needs = target.needs(source)
    (tmp_path / "out").mkdir()
    target.write(source, tmp_path / "out", lambda done, total, what="": None)
    before, after = (load_file(folder / "model.safetensors") for folder in (source.base, tmp_path / "out"))
    model = loaded(source.base)
    outside = [name for name, _ in model.named_parameters() if is_outside(name, language_model(model)[0])]
    towers = [name for name in before if any(part in name for part in ("vision", "visual"))]
    assert len(towers) > 10
    assert all(torch.equal(before[name], after[name]) for name in towers)
    assert any(name.endswith((".absmax", ".qweight")) for name in after)
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert family != "llava" or list(described["dynamic"]) == [r"-:(.*\.)?(multi_modal_projector|vision_tower)\..*"]
    with read_model(source, tmp_path / "out") as reader:
        assert np.isfinite(reader.logprobs(np.arange(3, 9))).all()
    assert "other linear layers stay as they are" in needs.notes[0]
    assert outside


@pytest.mark.parametrize(
    "family", ["gemma3", "llava", "qwen2_5_vl", *(pytest.param(each, marks=pytest.mark.slow) for each in _SLOW)]
)
def test_a_gguf_file_is_the_language_model_and_says_so(family: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    kinds = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    depth = {"num_hidden_layers": 7, "layer_types": kinds} if family == "gemma3" else {}
    text = {"vocab_size": 640, "head_dim": 16, "query_pre_attn_scalar": 16, **depth}
    if family.startswith("qwen2"):  # their sections are of this size; llama.cpp reads no epsilon, and computes with 0
        text |= {"head_dim": 8, "rms_norm_eps": 1e-12}
    source = make_source(tmp_path, family, **text)
    tokenizer_of("qwen2_5").save_pretrained(source.base)
    assert source.adapter is not None
    (tmp_path / "side").mkdir()
    made = plan(read_merged(source, tmp_path / "side"))
    write_plan(made, tmp_path / "merged.gguf", "f32")
    wanted = merged_logits(loaded(source.base), source.adapter, torch.tensor([TOKENS]))[0].float().numpy()
    with LlamaCpp(tmp_path / "merged.gguf") as llama:
        assert squared_error(llama.logits(TOKENS), wanted) < (
            1e-5 if family == "gemma3" else 1e-9
        )  # its GELU is a table
    needs = GGUFExportConfig(types=("f32",), mmproj=False).build().needs(source)
    (note,) = [note for note in needs.notes if "language model alone" in note]
    assert re.search(r"reads text only: without .*vis(ion_tower|ion_model|ual) \(\d\d tensors\)", note)
    convert(source.base, tmp_path / "base.gguf", "f32")
    if not made.model.config["tie_word_embeddings"]:
        write_adapter_file(plan(read_folder(source.base)), source.adapter, tmp_path / "lora.gguf")
        with LlamaCpp(tmp_path / "base.gguf", adapters=[(tmp_path / "lora.gguf", 1.0)]) as llama:
            assert squared_error(llama.logits(TOKENS), wanted) < 1e-6


def test_a_prefix_language_model_is_no_gguf_file(tmp_path: Path) -> None:
    """It would be Gemma's file, which is read from left to right."""
    source = make_source(tmp_path, "paligemma")
    for config in (GGUFExportConfig(types=("f32",)), LoraGGUFExportConfig()):
        with pytest.raises(ModelError, match=r"reads prompts both ways .* serve it from its merged checkpoint"):
            config.build().needs(source)


def test_upstreams_converter_is_asked_for_the_class_of_the_whole_model(tmp_path: Path) -> None:
    """config.json names it at the top, not in text_config."""
    source = make_source(tmp_path, "qwen3_5")
    converter = tmp_path / "llama.cpp"
    converter.mkdir()
    (converter / SCRIPT).touch()
    (converter / "supported.txt").write_text("Qwen3_5ForConditionalGeneration")
    target = GGUFExportConfig(types=("f32",), converter=converter).build()
    notes = target.needs(source).notes
    assert any("reads text only: without visual (" in note for note in notes)
    (converter / "supported.txt").write_text("LlamaForCausalLM")
    with pytest.raises(ModelError, match="can write Qwen3_5ForConditionalGeneration to GGUF"):
        target.needs(source)


def test_an_answer_ends_where_the_language_model_says(tmp_path: Path) -> None:
    """Old files say it in text_config alone."""
    from lowrank.models.stop_tokens import declared_stop_tokens

    base = save_composite_folder(tmp_path / "base", "llava")
    config = json.loads((base / "config.json").read_text())
    (base / "generation_config.json").unlink(missing_ok=True)
    config.pop("eos_token_id", None)
    config["text_config"]["eos_token_id"] = [2, 7]
    (base / "config.json").write_text(json.dumps(config))
    assert declared_stop_tokens(str(base)) == (2, 7)

"""The second file of models that see: written by llama.cpp's own converter, and shown a picture by llama.cpp."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.errors import ModelError
from lowrank.export.gguf import converters
from lowrank.export.gguf.converters import converter_for
from lowrank.export.gguf.header import read_header
from lowrank.export.gguf.tower import TowerFile
from lowrank.export.gguf.upstream import SCRIPT, Upstream
from lowrank.export.publish.ollama_server import plan as plan_deployment
from lowrank.export.targets.gguf import GGUFExportConfig
from lowrank.export.targets.ollama import OllamaExportConfig
from lowrank.export.verify.images import compare_images, reference_image_answer, synthetic_image
from lowrank.export.verify.readers import read_adapter
from lowrank.models.loading.quiet import quiet_transformers
from lowrank.pipelines.export import export_targets
from lowrank.pipelines.export_checks import ExportRequest
from lowrank.pipelines.export_source import ResolvedSource, open_source
from lowrank.serve.llama_cpp_engine.file_faults import check_files
from tests.checkpoints.test_peft_layout import random_adapter
from tests.tiny_composites import COMPOSITES, save_composite_folder
from tests.tiny_vision_models import VISION_MODELS, VOCABULARY, save_folder

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

_DEPTH = 4
"""Layers of a tower; of fewer the converter makes no file."""
_KINDS = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
_TEXT: dict[str, dict[str, Any]] = {
    # llama.cpp has Gemma's pattern of layers built in, and its Qwen2-VL reads no epsilon: it computes with 0.
    "gemma3": {"num_hidden_layers": 7, "layer_types": _KINDS, "head_dim": 16, "query_pre_attn_scalar": 16},
    "qwen2_vl": {"rms_norm_eps": 1e-12},
    "qwen2_5_vl": {"rms_norm_eps": 1e-12},
    # Frequencies that no section reaches stand still in llama.cpp; of released models they are the two slowest.
    "qwen3_vl": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}},
    "idefics3": {},
}
_TOKENS = {"idefics3": {278: "\n\n"}}
"""What llama.cpp puts before a picture and takes for one token."""
_MOST_KL = {"gemma3": 1e-3, "idefics3": 1e-3}
"""A GELU from a table; a picture that llama.cpp makes smaller for its overview. Of all others 1e-6."""


def save_seeing(folder: Path, family: str, seed: int = 0) -> Path:
    """A tiny base that both transformers and llama.cpp can run."""

    def make() -> Any:
        torch.manual_seed(seed)
        config = COMPOSITES[family]()
        config.get_text_config().vocab_size = VOCABULARY
        for name, value in _TEXT[family].items():
            setattr(config.get_text_config(), name, value)
        for name in ("num_hidden_layers", "depth"):
            if hasattr(config.vision_config, name):
                setattr(config.vision_config, name, _DEPTH)
        if hasattr(config.vision_config, "fullatt_block_indexes"):
            config.vision_config.fullatt_block_indexes = [1, 3]
            config.vision_config.window_size = 112  # llama.cpp has it built in
        model = transformers.AutoModelForMultimodalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:  # fresh ones hardly tell one picture from another
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    tokens = {**VISION_MODELS[family].tokens, **_TOKENS.get(family, {})}
    return save_folder(folder, replace(VISION_MODELS[family], tokens=tokens, config={}), make)


def with_adapter(base: Path, config: LoraConfig | None) -> ResolvedSource:
    found = open_source(str(base), notify=lambda text: None)
    if config is None:
        return found
    with quiet_transformers():
        model = transformers.AutoModelForMultimodalLM.from_pretrained(base, dtype=torch.float32)
    return replace(found, source=replace(found.source, adapter=random_adapter(model, config)))


@pytest.mark.slow
@pytest.mark.parametrize("family", _TEXT)
def test_llama_cpp_sees_what_base_and_adapter_see(family: str, upstream: Upstream, tmp_path: Path) -> None:
    """With the adapter on tower and projector too. Gemma 3's tower has transformers 5's names in these files."""
    config = LoraConfig(rank=2, freeze_vision_tower=False, freeze_multi_modal_projector=False)
    found = with_adapter(save_seeing(tmp_path / "base", family), config)
    config_of: Any = GGUFExportConfig(types=("f32",), converter=upstream.folder, mmproj=True)
    request = ExportRequest(config_of, tmp_path / "out")
    reported = export_targets(found, [request], notify=lambda text: None)["targets"]["gguf"]
    text, picture = reported["comparisons"]
    assert picture["name"].startswith("mmproj-")
    assert picture["passed"], picture["problems"]
    assert picture["mean_kl"] < _MOST_KL.get(family, 1e-6)
    assert text["passed"] or (family == "gemma3" and text["mean_kl"] < 1e-3)
    written = {path.name for path in (tmp_path / "out").glob("*.gguf")}
    assert len(written) == 2
    usage = (tmp_path / "out" / "README.md").read_text()
    assert all(name in usage for name in written)
    assert "llama-mtmd-cli" in usage


@pytest.mark.slow
def test_the_comparison_notices_a_tower_without_its_adapter(upstream: Upstream, tmp_path: Path) -> None:
    config = LoraConfig(rank=2, freeze_vision_tower=False, freeze_multi_modal_projector=False)
    found = with_adapter(save_seeing(tmp_path / "base", "qwen2_vl"), config)
    target = GGUFExportConfig(types=("f32",), converter=upstream.folder).build()
    for folder, each in (("trained", found.source), ("plain", replace(found.source, adapter=None))):
        (tmp_path / folder).mkdir()
        target.needs(each)
        target.write(each, tmp_path / folder, lambda done, total, what="": None)
    model = found.source.model.model_copy(update={"dtype": "float32"})
    with read_adapter(replace(found.source, model=model), found.source.adapter) as reader:
        seen = reference_image_answer(reader, found.renderer, found.source.stop_tokens)
    (read_back,) = [each for each in target.read_back(found.source, tmp_path / "trained") if each.compares_images]
    with read_back.open() as reader:
        right = compare_images(read_back, reader, seen)
    name = target.tower_path(found.source, Path()).name
    (tmp_path / "plain" / name).replace(tmp_path / "trained" / name)
    with read_back.open() as reader:
        wrong = compare_images(read_back, reader, seen)
    assert right.passed
    assert not wrong.passed
    assert wrong.mean_kl > 1e4 * right.mean_kl


@pytest.mark.slow
def test_what_the_converter_does_not_know_is_said(upstream: Upstream, tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", VISION_MODELS["internvl"], lambda: _plain("internvl"))
    found = open_source(str(base), notify=lambda text: None)
    target = GGUFExportConfig(types=("f32",), converter=upstream.folder)
    (note,) = [note for note in target.build().needs(found.source).notes if "language model alone" in note]
    assert "does not know the tower of InternVLForConditionalGeneration" in note


def _plain(family: str) -> Any:
    config = COMPOSITES[family]()
    config.get_text_config().vocab_size = VOCABULARY
    return transformers.AutoModelForMultimodalLM.from_config(config).eval()


def test_a_tower_that_llama_cpp_misreads_is_not_written(tmp_path: Path) -> None:
    """LLaVA 1.5's, of which nothing is fetched either."""
    found = open_source("lowrank/tiny-vision", notify=lambda text: None)
    needs = GGUFExportConfig(types=("f16",)).build().needs(found.source)
    (note,) = [note for note in needs.notes if "language model alone" in note]
    assert "without multi_modal_projector (4 tensors), vision_tower (71 tensors); llama.cpp computes towers" in note
    assert not needs.installs
    with pytest.raises(ModelError, match=r"(?s)gguf\.mmproj: true, and .*class token last.*leave gguf\.mmproj out"):
        GGUFExportConfig(types=("f16",), mmproj=True).build().needs(found.source)
    text = open_source("lowrank/tiny", notify=lambda text: None)
    with pytest.raises(ModelError, match="has no vision or audio tower"):
        GGUFExportConfig(types=("f16",), mmproj=True).build().needs(text.source)


def stand_in(
    folder: Path,
    known: str = "Gemma3ForConditionalGeneration",
    script: str = "raise SystemExit('error: no such tower')\n",
) -> Path:
    """A converter that says it knows a family, and fails, or does what `script` says."""
    folder.mkdir()
    (folder / SCRIPT).write_text(script)
    (folder / "supported.txt").write_text(known)
    (folder / "towers.txt").write_text(known)
    return folder


NOTES_NAMES = """
import json, pathlib, sys
folder, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
names = {}
for file in folder.glob("*.safetensors"):
    raw = file.read_bytes()
    names[file.name] = [name for name in json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]) if name[0] != "_"]
index = folder / "model.safetensors.index.json"
known = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
out.write_text(json.dumps([names, known]))
"""
"""A converter that writes down what it is given: the tensors of each file, and what the index says."""


def test_a_tower_in_the_shards_of_a_whole_model_has_its_names_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a family whose language model is written by llama.cpp's converter as well, from the same folder."""
    monkeypatch.setattr(converters, "_SHARD", 20_000)
    base = save_composite_folder(tmp_path / "base", "aya_vision")
    found = with_adapter(base, LoraConfig(rank=2, freeze_vision_tower=False, freeze_multi_modal_projector=False))
    own = stand_in(tmp_path / "converter", "AyaVisionForConditionalGeneration", NOTES_NAMES)
    side = tmp_path / "side"
    side.mkdir()
    converter = converter_for(found.source, side, ("f32",), own)
    assert converter.model.beside is not None
    tower = TowerFile(found.source, converter.model, converter.model.beside, True, Upstream(own))
    converter.write(tmp_path / "text.json", "f32", lambda done, total: None)
    tower.write(side, tmp_path / "tower.json", "f32")
    for file in ("text.json", "tower.json"):
        files, index = json.loads((tmp_path / file).read_text())
        assert len(files) > 2
        assert index == {name: each for each, names in files.items() for name in names}
        towers = [name for name in index if "vision_tower." in name]
        assert len(towers) > 20
        assert all("vision_tower.vision_model." in name for name in towers)


def test_the_language_model_is_written_where_its_tower_cannot_be(tmp_path: Path) -> None:
    found = open_source(str(save_seeing(tmp_path / "base", "gemma3")), notify=lambda text: None)
    converter = stand_in(tmp_path / "converter")
    target = GGUFExportConfig(types=("f32",), converter=converter).build()
    assert any(note.startswith("two files: ") for note in target.needs(found.source).notes)
    assert target.has_tower
    (tmp_path / "out").mkdir()
    described = target.write(found.source, tmp_path / "out", lambda done, total, what="": None)
    assert any("language model alone" in line and "no such tower" in line for line in described)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["base-F32.gguf"]
    assert not [each for each in target.read_back(found.source, tmp_path / "out") if each.compares_images]
    assert "--mmproj" not in target.usage(found.source, "there")
    required = GGUFExportConfig(types=("f32",), converter=converter, mmproj=True).build()
    required.needs(found.source)
    (tmp_path / "required").mkdir()
    with pytest.raises(ModelError, match=r"(?s)gguf\.mmproj: true.*no such tower"):
        required.write(found.source, tmp_path / "required", lambda done, total, what="": None)
    left = GGUFExportConfig(types=("f32",), converter=converter, mmproj=False).build().needs(found.source)
    assert any("gguf.mmproj is false" in note for note in left.notes)


def test_two_from_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Modelfile names both files, and both go to the server."""
    found = open_source(str(save_seeing(tmp_path / "base", "gemma3")), notify=lambda text: None)
    target = OllamaExportConfig(types=("f16",), converter=stand_in(tmp_path / "converter")).build()
    needs = target.needs(found.source)
    assert any("Ollama from 0.30 on" in note for note in needs.notes)
    monkeypatch.setattr(target.gguf, "write", lambda *_: [])  # the language model is written as any other
    target.write(found.source, tmp_path, lambda done, total, what="": None)
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[:2] == ["FROM ./base-F16.gguf", "FROM ./mmproj-base-F16.gguf"]
    (tmp_path / "base-F16.gguf").write_bytes(b"one")
    with pytest.raises(ModelError, match=r"FROM \./mmproj-base-F16\.gguf: there is no such file"):
        plan_deployment("mine", tmp_path)
    (tmp_path / "mmproj-base-F16.gguf").write_bytes(b"two")
    wanted = plan_deployment("mine", tmp_path)
    assert list(wanted.request()["files"]) == ["base-F16.gguf", "mmproj-base-F16.gguf"]
    assert [blob.path.name for blob in wanted.blobs] == list(wanted.request()["files"])


def test_a_towers_file_is_no_model_to_serve(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "mmproj-it.gguf", "clip")
    writer.add_type("mmproj")
    writer.add_tensor("v.class_embd", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_header(tmp_path / "mmproj-it.gguf").fields["general.architecture"] == "clip"
    with pytest.raises(ModelError, match=r"a tower.s file, for llama\.cpp's --mmproj; give the language model's"):
        check_files(tmp_path / "mmproj-it.gguf", [])


def test_the_picture_has_no_two_equal_quarters() -> None:
    pixels = synthetic_image(16)
    quarters = [pixels[y : y + 8, x : x + 8].tolist() for y in (0, 8) for x in (0, 8)]
    assert len({json.dumps(each) for each in quarters}) == 4

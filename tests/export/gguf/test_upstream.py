"""llama.cpp's own converter: for families that lowrank does not know, and as the judge of those that it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lowrank.errors import ModelError
from lowrank.export.gguf.convert import convert
from lowrank.export.gguf.llama_cpp import LlamaCpp, squared_error
from lowrank.export.gguf.upstream import SCRIPT, Upstream
from lowrank.export.targets.gguf import GGUFExportConfig
from lowrank.export.targets.ollama import OllamaExportConfig
from lowrank.pipelines.export import export_targets
from lowrank.pipelines.export_checks import ExportRequest
from lowrank.pipelines.export_source import open_source
from tests.data.made_tokenizers import tokenizer_of
from tests.export.gguf.families import save
from tests.tiny_models import tiny

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

TOKENS = list(range(300, 340))


def save_unknown(folder: Path, name: str = "SmolLM3Config") -> Any:
    """A family that lowrank has no conversion for, with a tokenizer like Llama 2's."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of("mistral", "{% for m in messages %}{{ m.content }}</s>{% endfor %}", metaspace=True)
    config = tiny(name, hidden_size=64, intermediate_size=96, vocab_size=len(tokenizer), max_position_embeddings=512)()
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.slow
def test_what_is_fetched(upstream: Upstream) -> None:
    size = sum(path.stat().st_size for path in upstream.folder.rglob("*"))
    assert size < 14e6
    assert (upstream.folder / "LICENSE").read_text().startswith("MIT License")
    upstream.check("SmolLM3ForCausalLM")
    with pytest.raises(ModelError, match=r"neither lowrank nor .* can write OPTForCausalLM to GGUF"):
        upstream.check("OPTForCausalLM")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SmolLM3Config", "ArceeConfig", "ApertusConfig"])
def test_a_family_that_lowrank_does_not_know(name: str, upstream: Upstream, tmp_path: Path) -> None:
    """Its tensors are right. Its tokenizer is not where there is no tokenizer.model: upstream gives every token of a
    tokenizer.json like Llama 2's the same score, and llama.cpp merges by scores. That is found, and nothing is left."""
    model = save_unknown(tmp_path / "model", name)
    upstream.convert(tmp_path / "model", tmp_path / "it.gguf", "f32", "it")
    with torch.no_grad(), LlamaCpp(tmp_path / "it.gguf") as llama:
        wanted = model(torch.tensor([TOKENS])).logits[0].numpy()
        assert squared_error(llama.logits(TOKENS), wanted) < 1e-9
    found = open_source(str(tmp_path / "model"), notify=lambda text: None)
    target = GGUFExportConfig(types=("f32", "q4_0"), converter=upstream.folder)
    described: list[str] = []
    with pytest.raises(ModelError, match=r"llama\.cpp gives other tokens for .* would not understand its input"):
        export_targets(found, [ExportRequest(target, tmp_path / "out")], notify=described.append)
    assert any("with no test of lowrank's behind it" in line for line in described)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama 3.1", "mixtral"])
def test_ours_writes_the_same_bytes(family: str, upstream: Upstream, tmp_path: Path) -> None:
    """Of the tensors, where the tokenizer is one that llama.cpp knows."""
    save(family, tmp_path / "model", torch.bfloat16)
    tokenizer_of("mistral", metaspace=True).save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "ours.gguf", "q8_0")
    upstream.convert(tmp_path / "model", tmp_path / "theirs.gguf", "q8_0", "it")
    ours, theirs = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"{whose}.gguf").tensors}
        for whose in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type
        np.testing.assert_array_equal(tensor.data, theirs[name].data)


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said what would be fetched; refused with both ways out, and nothing is written."""
    save_unknown(tmp_path / "model")
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    found = open_source(str(tmp_path / "model"), notify=lambda text: None)
    request = ExportRequest(GGUFExportConfig(types=("f16",)), tmp_path / "out")
    dry: list[str] = []
    export_targets(found, [request], dry_run=True, notify=dry.append)
    assert any("llama-cpp-python" in line and "77 MB" in line and str(tmp_path / "cache") in line for line in dry)
    described: list[str] = []
    with pytest.raises(ModelError, match=r"(?s)fetching llama\.cpp's converter.*gguf\.converter=FOLDER.*--to merged"):
        export_targets(found, [request], notify=described.append)
    assert any("77 MB" in line for line in described)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").iterdir())
    for config in (GGUFExportConfig, OllamaExportConfig):
        with pytest.raises(ModelError, match=f"converter: .* has no {SCRIPT}; name the folder of llama"):
            config(types=("f16",), converter=tmp_path).build().needs(found.source)

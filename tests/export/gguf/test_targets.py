"""An adapter of the shipped base, exported as GGUF files that llama.cpp runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lowrank.cli.main import main
from lowrank.errors import ModelError
from lowrank.export.gguf.importance import DATA
from lowrank.export.gguf.llama_cpp import LlamaCpp
from lowrank.export.targets import gguf as targets_gguf
from lowrank.export.targets.gguf import GGUFExportConfig
from lowrank.export.targets.lora_gguf import LoraGGUFExportConfig
from lowrank.export.targets.ollama import OllamaExportConfig
from lowrank.models.loading.pretrained import TINY, locate
from lowrank.pipelines.export import export_targets
from lowrank.pipelines.export_checks import ExportRequest
from lowrank.pipelines.export_source import open_source

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return saved_adapter(tmp_path_factory.mktemp("adapter") / "taught")


def saved_adapter(folder, **settings):
    """A random adapter, in PEFT's layout."""
    model = transformers.AutoModelForCausalLM.from_pretrained(locate(TINY), dtype=torch.float32)
    torch.manual_seed(0)
    both = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings))
    for name, parameter in both.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    both.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": TINY}))
    return folder


def test_from_adapter_to_llama_cpp(adapter, tmp_path, capsys):
    arguments = [
        "export",
        str(adapter),
        "--to",
        "gguf,lora_gguf",
        "--type",
        "f32,q8_0,q4_k_m",
        "-o",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    assert ended.value.code == 0
    files = sorted(path.name for path in (tmp_path / "out").rglob("*.gguf"))
    assert files == ["taught-F32.gguf", "taught-Q4_K_M.gguf", "taught-Q8_0.gguf", "taught-lora.gguf"]
    saved = json.loads((tmp_path / "out" / "gguf" / "export.json").read_text())
    found = {each["name"]: each for each in saved["comparisons"]}
    assert found["taught-F32.gguf"]["mean_kl"] < 1e-9
    assert found["taught-F32.gguf"]["mean_kl"] < found["taught-Q8_0.gguf"]["mean_kl"]
    assert found["taught-Q8_0.gguf"]["mean_kl"] < found["taught-Q4_K_M.gguf"]["mean_kl"]
    assert found["taught-F32.gguf"]["against"] is None
    assert found["taught-Q4_K_M.gguf"]["against"] == "taught-F32.gguf"
    difference = found["taught-Q4_K_M.gguf"]["against_mean_kl"] / found["taught-Q4_K_M.gguf"]["mean_kl"]
    assert difference == pytest.approx(1, abs=0.01)  # the file in float32 is the model
    capsys.readouterr()
    tokenizer = transformers.AutoTokenizer.from_pretrained(locate(TINY))
    requested = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(requested, add_generation_prompt=True).input_ids
    with LlamaCpp(tmp_path / "out" / "gguf" / "taught-Q8_0.gguf") as llama:
        answer, stopped = llama.generate(prompt, 200)
    assert stopped
    assert tokenizer.eos_token_id not in answer


def test_quantized_types_are_judged_by_the_16_bit_file(adapter, tmp_path, monkeypatch):
    """Also where nobody asked for that file: it is made, compared with, and gone."""
    allowed = targets_gguf.tolerance
    monkeypatch.setattr(targets_gguf, "tolerance", lambda kind: dataclasses.replace(allowed(kind), mean_kl=1e-5))
    described = []
    found = open_source(str(adapter), notify=described.append)
    result = export_targets(
        found,
        [ExportRequest(targets_gguf.GGUFExportConfig(types=("q4_0",)), tmp_path / "out")],
        notify=described.append,
    )
    (compared,) = result["targets"]["gguf"]["comparisons"]
    assert not result["passed"]
    assert compared["against"] == "taught-F16.gguf"
    assert any("mean KL from taught-F16.gguf is" in problem for problem in compared["problems"])
    assert compared["against_top1_agreement"] > 0.5
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["README.md", "export.json", "taught-Q4_0.gguf"]


def test_dora_is_merged_instead_and_said(tmp_path):
    folder = saved_adapter(tmp_path / "taught", use_dora=True)
    described = []
    found = open_source(str(folder), notify=described.append)
    result = export_targets(found, [ExportRequest(LoraGGUFExportConfig(), tmp_path / "out")], notify=described.append)
    assert any(
        "a dora adapter is more than a product" in line and "is written instead, as q8_0" in line for line in described
    )
    assert result["passed"]
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == ["taught-Q8_0.gguf"]
    with pytest.raises(ModelError, match=r"leave as_adapter out"):
        OllamaExportConfig(as_adapter=True).build().needs(found.source)


def test_an_ollama_model_has_every_setting_of_its_file(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "types": ("q4_0",),
        "importance": DATA,
        "threads": 3,
        "converter": tmp_path,
        "mmproj": False,
    }
    assert GGUFExportConfig.model_fields.keys() == {"type", *given}
    made = OllamaExportConfig(**given).build().gguf.config
    assert made == GGUFExportConfig(**given)

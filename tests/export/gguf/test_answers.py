"""From training to llama.cpp: the held-out questions of the demo are answered as the adapter answers them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.exports import ONE_JOB, questions
from lowrank.config import load
from lowrank.data import demo
from lowrank.export.gguf.llama_cpp import LlamaCpp
from lowrank.export.targets.gguf import GGUFExportConfig
from lowrank.export.verify.readers import read_adapter
from lowrank.generate.sampler import GenerationConfig, Prompt, generate
from lowrank.pipelines.export import export_targets
from lowrank.pipelines.export_checks import ExportRequest
from lowrank.pipelines.export_source import open_source
from lowrank.pipelines.train import train

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


@pytest.mark.slow
def test_exact_match_of_the_files_is_the_adapter_s(tmp_path: Path) -> None:
    run, types = tmp_path / "run", ("f16", "q8_0", "q4_k_m")
    train(load(Path(demo.__file__).parent / "demo.yaml", [f"output_dir={run}", ONE_JOB]))
    found = open_source(str(run))
    source, requested = found.source, questions(found, 100)

    def score(answers: list[list[int]]) -> float:
        described = [source.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]
        return sum(text == expected.strip() for text, (_, expected) in zip(described, requested)) / len(requested)

    with read_adapter(source, source.adapter) as reader:
        prompts = [Prompt(prompt, reader.slot) for prompt, _ in requested]
        settings = GenerationConfig(max_new_tokens=96)
        trained = score(generate(reader.base, reader.bank, prompts, settings, stop_tokens=source.stop_tokens))
    assert trained > 0.9
    target = GGUFExportConfig(types=types)
    assert export_targets(found, [ExportRequest(target, tmp_path / "out")])["passed"]
    for kind in types:
        with LlamaCpp(target.build().path(source, tmp_path / "out", kind)) as llama:
            answers = [llama.generate(prompt.tolist(), 96, source.stop_tokens)[0] for prompt, _ in requested]
        assert score(answers) >= trained - (0.02 if kind != "q4_k_m" else 0.1), kind

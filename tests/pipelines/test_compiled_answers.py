"""Compiled decoder layers wherever a model is asked: Python, `chat`, `predict`, answers that a run trains on."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowrank
from lowrank.adapters.bank import Bank
from lowrank.cli.main import main
from lowrank.config import RunConfig
from lowrank.errors import ConfigError
from lowrank.generate.compiled_decoding import CompiledDecoding
from lowrank.generate.generator import Generator
from lowrank.generate.request import GenerationConfig, Prompt
from lowrank.pipelines.train import train
from lowrank.report.events import Notice, StepDone
from tests.checkpoint_folder import write_alpaca
from tests.generate.test_compiled_decoding import Counting
from tests.generate.test_generator import text
from tests.tiny_models import make_base

QUESTIONS = ["Who are you?", "Count to three.", "Hello"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_alpaca(folder / "train.json", 16)
    jobs = [{"name": "a", "optimizer": {"learning_rate": 5e-3}}, {"name": "b", "adapter": {"rank": 2}}]
    settings: dict[str, Any] = {
        "model": {"path": "lowrank/tiny", "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(folder / "train.json")], "batch_size": 4},
        "max_steps": 3,
        "output_dir": str(folder / "run"),
        "jobs": jobs,
    }
    train(RunConfig.model_validate(settings))
    return folder / "run"


class Runs(Counting):
    """Counts how often what it compiled was called, too: a model loaded again compiles nothing anew."""

    def __init__(self) -> None:
        super().__init__(self._counted)
        self.runs = 0

    def _counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*inputs: Any) -> Any:
            self.runs += 1
            return run(*inputs)

        return counted


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """In inductor's place, which needs a C++ compiler and most of a minute."""
    counting = Runs()
    through = functools.partial(CompiledDecoding, backend=counting)
    for module in ("lowrank.pipelines.inference", "lowrank.train.rollout_generator"):
        monkeypatch.setattr(f"{module}.CompiledDecoding", through)
    return counting


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    with pytest.raises(SystemExit) as caught:
        main([*arguments])
    output = capsys.readouterr()
    assert caught.value.code == 0, output
    return output.out, output.err


def test_a_loaded_model_keeps_its_compiled_layers(run: Path, compiler: Runs) -> None:
    notes: list[str] = []
    plain, ours = lowrank.load(run), lowrank.load(run, compile=True, notify=notes.append)
    assert ours.generate(QUESTIONS, "a", max_new_tokens=8) == plain.generate(QUESTIONS, "a", max_new_tokens=8)
    compiled = compiler.graphs
    assert compiled >= 1
    for name in ("a", "b", "base"):  # other adapters, another generator for each question
        assert ours.generate(QUESTIONS, name, max_new_tokens=8) == plain.generate(QUESTIONS, name, max_new_tokens=8)
    assert ours.compare("Hello", max_new_tokens=8) == plain.compare("Hello", max_new_tokens=8)
    assert compiler.graphs <= compiled + 2, "without adapters, and with several in a step"
    assert ours.inference.compiled is not None
    assert (ours.inference.compiled.problem, plain.inference.compiled, notes) == (None, None, [])


def test_chat_and_predict(run: Path, compiler: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ["chat", str(run), "--adapter", "a,b,base", "-p", "Hello", "--max-new-tokens", "6", "--json"]
    plain, _ = command(capsys, *question)
    assert command(capsys, *question, "--compile") == (plain, "")
    seen = compiler.runs
    assert seen > 0
    predicted = [str(run), "--data", str(run.parent / "train.json"), "--max-samples", "3", "--metrics", "exact_match"]
    for name, option in (("plain", ()), ("compiled", ("--compile",))):
        folder = str(tmp_path / name)
        command(capsys, "predict", *predicted, "--max-new-tokens", "6", "--output", folder, *option)
    written = [(tmp_path / name / "predictions.jsonl").read_text("utf-8") for name in ("plain", "compiled")]
    assert written[0] == written[1]
    assert compiler.runs > seen


def test_a_family_in_fixed_batches_is_answered_plainly_and_says_why() -> None:
    base, notes, backend = make_base("bloom"), [], Counting()
    bank = Bank(base)
    compiled = CompiledDecoding(base, bank, notes.append, backend)
    for _ in range(2):
        generator = Generator(base, bank, compiled=compiled)
        assert generator.submit(Prompt(text(0, 5), -1), GenerationConfig(max_new_tokens=3)).result().tokens
    (note,) = notes
    assert "fixed batches" in note
    assert backend.graphs == 0


def test_a_gguf_file_has_no_layers_here() -> None:
    with pytest.raises(ConfigError, match=r"run by llama\.cpp, which has no layers to compile"):
        lowrank.load("model.gguf", compile=True)


@pytest.fixture
def rollouts(tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"Count to {n}.", "solution": n} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    objective = {"type": "grpo", "reward_funcs": ["tests.train.rewards:digits"], "num_generations": 3}
    return {
        "model": {"path": "lowrank/tiny", "device": "cpu", "dtype": "float32", "activation_checkpointing": "full"},
        "data": {"train": str(tmp_path / "prompts.jsonl"), "batch_size": 2, "max_length": 64},
        "optimizer": {"learning_rate": 5e-3},
        "max_steps": 4,
        "eval_steps": None,
        "jobs": [
            {"name": "one", "objective": {**objective, "max_completion_length": 6}},
            {"name": "two", "objective": {**objective, "max_completion_length": 8}, "adapter": {"rank": 2}},
        ],
    }


def trained(settings: dict[str, Any], out: Path, *, compile: bool) -> tuple[list[Any], list[str], list[Any]]:
    jobs = [{**job, "objective": {**job["objective"], "compile": compile}} for job in settings["jobs"][:1]]
    events: list[Any] = []
    config = RunConfig.model_validate({**settings, "output_dir": str(out), "jobs": [*jobs, *settings["jobs"][1:]]})
    lowrank.train(config, reporters=[events.append], progress=False, allow_code=True)
    losses = [(each.job, each.loss, each.metrics) for each in events if isinstance(each, StepDone)]
    notes = [each.text for each in events if isinstance(each, Notice) and "compiled" in each.text]
    return losses, notes, [load_file(out / name / "last" / "adapter_model.safetensors") for name in ("one", "two")]


@pytest.mark.slow
def test_rollouts_of_all_jobs_while_their_weights_change(
    rollouts: dict[str, Any], compiler: Runs, tmp_path: Path
) -> None:
    plain, _, expected = trained(rollouts, tmp_path / "plain", compile=False)
    assert compiler.graphs == 0
    losses, notes, weights = trained(rollouts, tmp_path / "compiled", compile=True)
    assert notes == []
    assert 1 <= compiler.graphs <= 3, "once for all steps of the run"
    assert [metrics["reward"] for _, _, metrics in losses] == [metrics["reward"] for _, _, metrics in plain]
    assert [loss for _, loss, _ in losses] == pytest.approx([loss for _, loss, _ in plain], rel=1e-4, abs=1e-6)
    for own, theirs in zip(weights, expected):
        for name, value in own.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_with_inductor(run: Path, rollouts: dict[str, Any], tmp_path: Path) -> None:
    notes: list[str] = []
    plain, ours = lowrank.load(run), lowrank.load(run, compile=True, notify=notes.append)
    assert ours.generate(QUESTIONS, "a", max_new_tokens=8) == plain.generate(QUESTIONS, "a", max_new_tokens=8)
    assert notes == []
    expected, _, _ = trained(rollouts, tmp_path / "plain", compile=False)
    losses, spoken, _ = trained(rollouts, tmp_path / "compiled", compile=True)
    assert spoken == []
    assert [metrics["reward"] for _, _, metrics in losses] == [metrics["reward"] for _, _, metrics in expected]

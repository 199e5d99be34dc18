"""`lowrank eval`: the numbers of lm-eval's own transformers model on the merged adapter, all models in one pass."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

pytest.importorskip("lm_eval")

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lowrank.checkpoints.atomic import current
from lowrank.cli.main import main
from lowrank.config import RunConfig
from lowrank.data.chat import template_budget
from lowrank.errors import ModelError
from lowrank.evaluate import harness, harness_tasks
from lowrank.evaluate.harness_tasks import find_tasks, names_of
from lowrank.generate.compiled_decoding import CompiledDecoding
from lowrank.pipelines.train import train
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca
from tests.generate.test_compiled_decoding import Counting

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own

CHOICE = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
num_fewshot: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITTEN = """task: tiny_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
num_fewshot: 0
generation_kwargs: {{until: ["2", "\\n\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
TASKS = ["tiny_choice", "tiny_written", "tiny_rolling"]


class OwnTasks(TaskManager):
    """Without lm-eval's own list."""

    def __init__(self, include_path: str, include_defaults: bool = True) -> None:
        super().__init__(include_path=include_path, include_defaults=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_checkpoint_folder(folder / "model", max_position_embeddings=128)
    write_alpaca(folder / "train.json", 12)
    settings: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(folder / "train.json")], "batch_size": 4},
        "max_steps": 4,
        "output_dir": str(folder / "run"),
        "jobs": [{"name": "a", "optimizer": {"learning_rate": 0.05}}, {"name": "b", "adapter": {"rank": 2}}],
    }
    train(RunConfig.model_validate(settings))
    (folder / "tasks").mkdir()
    for name, text in zip(TASKS, (CHOICE, WRITTEN, ROLLING)):
        (folder / "tasks" / f"{name}.yaml").write_text(text.format(folder=folder), "utf-8")
    rows = [
        {
            "question": f"Say {number} " * (24 if number == 3 else 1),  # one is longer than the model reads
            "choices": [f"{number}", "no", f"{number} {number}", "是"],
            "label": number % 4,
            "answer": f"{number} {number}",
            "text": f"Say {number}: {number} " * (1 + 4 * number),
        }
        for number in range(6)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def theirs(world: Path, adapter: str | None, out: Path) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, current(world / "run" / adapter / "best")).merge_and_unload()
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(world / "model").save_pretrained(out)
    lm = HFLM(pretrained=str(out), dtype="float32", device="cpu", batch_size=2)
    manager = find_tasks(TASKS, world / "tasks")
    return simple_evaluate(lm, tasks=TASKS, task_manager=manager, bootstrap_iters=0)  # type: ignore[return-value]


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["eval", *arguments])
    output = capsys.readouterr()
    assert caught.value.code == code, output
    return output.out, output.err


def test_equal_to_lm_eval_on_the_merged_model(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    score = harness.continuation_logprobs

    def counted(base: Any, bank: Any, entries: Any, **how: Any) -> Any:
        passes.append(len({slot for slot, _, _ in entries}))
        return score(base, bank, entries, **how)

    monkeypatch.setattr(harness, "continuation_logprobs", counted)
    arguments = [str(world / "run"), "--tasks", ",".join(TASKS), "--include-path", str(world / "tasks")]
    out, err = evaluate(capsys, *arguments, "--json")
    ours = json.loads(out.splitlines()[-1])
    assert passes == [3, 3], "choices once and rolling texts once, for all models together"
    assert list(ours["results"]) == ["base", "a", "b"]
    assert ours["shortened"] > 0
    assert "cut on the left" in err
    for model_name, adapter in (("base", None), ("a", "a")):
        expected = theirs(world, adapter, tmp_path / model_name)
        for task in TASKS:
            written = world / "run" / "eval" / model_name / f"samples_{task}.jsonl"
            described = [json.loads(line) for line in written.read_text("utf-8").split("\n") if line]
            for one, other in zip(described, expected["samples"][task]):
                assert one["doc"] == other["doc"]
                for mine, his in zip(one["filtered_resps"], other["filtered_resps"]):
                    if task == "tiny_choice":
                        assert float(mine[0]) == pytest.approx(float(his[0]), abs=1e-4)
                        assert str(mine[1]) == str(his[1])
                    else:
                        assert mine == (his if task == "tiny_written" else pytest.approx(his, abs=2e-3))
            for metric, value in expected["results"][task].items():
                if isinstance(value, float):
                    assert ours["results"][model_name][task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
    results = json.loads((world / "run" / "eval" / "a" / "results.json").read_text("utf-8"))
    assert results["config"]["model_args"]["adapter"] == "a"
    assert results.keys() >= {"results", "configs", "versions", "n-shot", "config", "higher_is_better"}
    differ = [ours["results"][model_name]["tiny_rolling"]["word_perplexity,none"] for model_name in ("base", "a")]
    assert differ[0] != pytest.approx(differ[1])
    page = (world / "run" / "report.html").read_text("utf-8")
    assert "tiny_choice" not in page
    with pytest.raises(SystemExit):
        main(["report", str(world / "run")])
    assert "tiny_choice" in (world / "run" / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_answers_through_compiled_layers(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Counting()
    monkeypatch.setattr(
        "lowrank.pipelines.inference.CompiledDecoding", functools.partial(CompiledDecoding, backend=compiler)
    )
    arguments = [str(world / "run"), "--tasks", "tiny_written", "--include-path", str(world / "tasks"), "--json"]
    plain, _ = evaluate(capsys, *arguments, "--output", str(tmp_path / "plain"))
    assert compiler.graphs == 0
    ours, _ = evaluate(capsys, *arguments, "--output", str(tmp_path / "compiled"), "--compile")
    assert compiler.graphs >= 1
    results = [json.loads(out.splitlines()[-1])["results"] for out in (plain, ours)]
    assert results[0] == results[1]


def test_names_are_those_people_use() -> None:
    assert names_of("mmlu, ceval,,cmmlu ,gsm8k") == ["mmlu", "ceval-valid", "cmmlu", "gsm8k"]


def test_a_diverged_adapter_has_no_result_and_the_others_have(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = current(world / "run" / "b" / "best") / "adapter_model.safetensors"
    before = load_file(weights)
    save_file({name: torch.full_like(value, torch.nan) for name, value in before.items()}, weights)
    arguments = [str(world / "run"), "--tasks", "tiny_choice", "--include-path", str(world / "tasks"), "--json"]
    try:
        out, err = evaluate(capsys, *arguments, "--output", str(tmp_path))
    finally:
        save_file(before, weights)
    result = json.loads(out.splitlines()[-1])
    assert list(result["results"]) == ["base", "a"]
    assert list(result["failed"]) == ["b"]
    assert "b: its probabilities are not finite" in err


@pytest.mark.parametrize(
    ("arguments", "code", "described"),
    [
        (["--tasks", "tiny_chioce"], 2, "did you mean 'tiny_choice'"),
        pytest.param(["--tasks", "gsm8kk"], 2, "did you mean 'gsm8k'", marks=pytest.mark.slow),
        (["--tasks", "tiny_choice", "--adapter", "c"], 4, "there is no adapter 'c' here"),
        (["--tasks", ","], 2, "name at least one"),
    ],
)
def test_mistakes_are_named(
    world: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    described: str,
) -> None:
    if arguments[1] == "tiny_chioce":  # to read lm-eval's own list takes eight seconds
        monkeypatch.setattr(harness_tasks, "TaskManager", OwnTasks)
    _, err = evaluate(capsys, str(world / "run"), "--include-path", str(world / "tasks"), *arguments, code=code)
    assert described in err


def test_the_template_of_a_base_has_limits_in_every_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rendering (the mask's) is cheap, and one of a task's questions is not."""
    monkeypatch.setattr(template_budget, "SECONDS", 0.3)
    template = "{% if 'trap' in messages[0].content %}{% for a in range(9999) %}{% for b in range(9999) %}"
    template += "{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}"
    lm = object.__new__(harness.BankLM)
    lm.tokenizer, lm.model_name = SimpleNamespace(special_tokens_map={}), "base"
    lm.renderer = SimpleNamespace(chat_template=template, config=SimpleNamespace(chat_template_kwargs={}))  # type: ignore[assignment]
    assert lm.apply_chat_template([{"role": "user", "content": "fine"}]) == "fine"
    assert lm.apply_chat_template([{"role": "user", "content": "fi"}], add_generation_prompt=False) == "fi"
    with pytest.raises(ModelError, match=r"range|computes"):
        lm.apply_chat_template([{"role": "user", "content": "trap"}])

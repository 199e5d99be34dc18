"""`lowrank predict`: every adapter of a run on one file, numbers that can be checked by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank.checkpoints.atomic import current
from lowrank.cli.main import main
from lowrank.config import RunConfig
from lowrank.evaluate import predict as module
from lowrank.pipelines.train import train
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_checkpoint_folder(folder / "model")
    write_alpaca(folder / "train.json", 12)
    jobs = [{"name": "weak"}, {"name": "strong", "optimizer": {"learning_rate": 0.05}}]
    settings: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(folder / "train.json")], "batch_size": 4},
        "max_steps": 6,
        "output_dir": str(folder / "run"),
        "jobs": jobs,
    }
    train(RunConfig.model_validate(settings))
    return folder


def predict(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["predict", *map(str, arguments), "--max-new-tokens", "6"])
    output = capsys.readouterr()
    assert caught.value.code == code, output
    return output.out, output.err


def test_all_adapters_in_one_pass(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = predict(capsys, str(world / "run"), "--data", str(world / "train.json"), "--llamafactory", "--json")
    result = json.loads(out)
    assert list(result["metrics"]) == ["base", "weak", "strong"]
    lines = [json.loads(line) for line in Path(result["predictions"]).read_text("utf-8").splitlines()]
    assert len(lines) == result["rows"] == 12
    for model_name, metrics in result["metrics"].items():
        described = [line["predictions"][model_name].strip() == line["label"].strip() for line in lines]
        assert metrics["exact_match"]["value"] == pytest.approx(100 * sum(described) / 12)
        assert metrics["bleu4"]["interval"][0] <= metrics["bleu4"]["value"] <= metrics["bleu4"]["interval"][1]
        assert ("gain" in metrics["perplexity"]) == (model_name != "base")
        assert "llamafactory_bleu4" in metrics
    learned = result["metrics"]["strong"]["perplexity"]
    untouched = result["metrics"]["base"]["perplexity"]
    assert learned["value"] != untouched["value"]
    assert learned["gain"]["value"] == pytest.approx(learned["value"] - untouched["value"])
    assert learned["gain"]["low"] <= learned["gain"]["value"] <= learned["gain"]["high"]
    assert lines[0]["prompt"][-1]["role"] == "user"
    assert json.loads((world / "run" / "predict" / "train" / "metrics.json").read_text("utf-8")) == result


def test_an_interrupted_one_goes_on(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = [str(world / "run"), "--data", str(world / "train.json"), "--json", "--output"]
    whole, _ = predict(capsys, *arguments, str(tmp_path / "whole"))
    answered = 0
    read = module.answer_text_of

    def stop(renderer: Any, tokens: Any) -> str:
        nonlocal answered
        answered += 1
        if answered == 20:
            raise KeyboardInterrupt
        return read(renderer, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(module, "answer_text_of", stop)
        with pytest.raises(BaseException):  # noqa: B017 (typer turns it into an exit)
            main(["predict", *arguments, str(tmp_path / "again"), "--max-new-tokens", "6"])
    (partial,) = (tmp_path / "again").glob("unfinished-*")
    with open(partial, "a", encoding="utf-8") as file:
        file.write('{"digest": "half a li')
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert message.startswith(f"interrupted; the answers so far are kept in {tmp_path / 'again'}: the same command")
    answered = -1000
    monkeypatch.setattr(module, "answer_text_of", stop)
    out, _ = predict(capsys, *arguments, str(tmp_path / "again"))
    assert answered == -1000 + 36 - 19, "19 answers were there already"
    assert json.loads(out)["metrics"] == json.loads(whole)["metrics"]
    assert [path.name for path in sorted((tmp_path / "again").iterdir())] == ["metrics.json", "predictions.jsonl"]


def test_a_table_for_people(world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [
        str(world / "run"),
        "--data",
        str(world / "train.json"),
        "--output",
        str(tmp_path),
        "--max-samples",
        "5",
    ]
    out, err = predict(capsys, *arguments, "--adapter", "base,strong", "--metrics", "exact_match")
    assert "5 rows" in out
    assert "strong" in out
    assert "weak" not in out
    assert "5 of 12 rows are taken" in err


def test_what_has_no_answer_is_counted_and_in_no_metric(
    world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A question beyond the model's reach, and an adapter that gives NaN: named, counted, null, and left out."""
    run = shutil.copytree(world / "run", tmp_path / "run", symlinks=True)
    weights = current(run / "weak" / "best") / "adapter_model.safetensors"
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(weights).items()}, weights)
    rows = [*json.loads((world / "train.json").read_text("utf-8"))[:3], {"instruction": "x" * 600, "output": "y"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    arguments = [str(run), "--data", str(tmp_path / "rows.json"), "--json", "--output", str(tmp_path / "out")]
    out, err = predict(capsys, *arguments)
    result = json.loads(out)
    assert result["unanswered"] == {"base": 1, "strong": 1, "weak": 4}
    assert "weak: no answer to 4 of 4 questions (the probabilities are not finite" in err
    assert "base, strong: no answer to 1 of 4 questions" in err
    assert "the model's maximum context length is 512" in err
    assert "weak: perplexity leaves out 3 questions whose log-probabilities are not finite" in err
    assert "perplexity leaves out 1 of 4 questions (" in err
    assert result["metrics"]["weak"] == {}
    assert {
        metric["rows"] for model_name in ("base", "strong") for metric in result["metrics"][model_name].values()
    } == {3}
    lines = [json.loads(line) for line in Path(result["predictions"]).read_text("utf-8").splitlines()]
    assert [list(line.get("problems", {})) for line in lines] == [["weak"]] * 3 + [["base", "weak", "strong"]]
    assert lines[3]["predictions"] == {"base": None, "weak": None, "strong": None}
    shorter, _ = predict(capsys, *arguments, "--adapter", "base,strong")
    (tmp_path / "rows.json").write_text(json.dumps(rows[:3]), "utf-8")
    whole, _ = predict(capsys, *arguments, "--adapter", "base,strong")
    assert json.loads(shorter)["metrics"] == json.loads(whole)["metrics"], "as if the question had not been asked"


@pytest.mark.parametrize(
    ("rows", "arguments", "code", "described"),
    [
        ([{"text": "no question"}], [], 3, "plain text asks nothing"),
        ([], [], 3, "has no rows"),
        ([{"instruction": "a", "output": "b"}], ["--adapter", "stong"], 4, "did you mean 'strong'"),
        ([{"instruction": "a", "output": "b"}], ["--metrics", "blue"], 2, "no metric 'blue'"),
    ],
)
def test_mistakes_are_named(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, str]],
    arguments: list[str],
    code: int,
    described: str,
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    _, err = predict(capsys, str(world / "run"), "--data", str(tmp_path / "rows.json"), *arguments, code=code)
    assert described in err

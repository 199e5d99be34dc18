"""Models that are asked about pictures: in a terminal, by a script, in a report, while they train."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lowrank
from lowrank.cli.chat_repl import ChatRepl
from lowrank.cli.main import main
from lowrank.compat.llamafactory.dataset_info import named_sources
from lowrank.data.config import SourceConfig
from lowrank.errors import DataError
from lowrank.generate.request import GenerationConfig
from lowrank.pipelines.inference import open_inference_model
from lowrank.pipelines.predict import PredictRequest, predict
from lowrank.pipelines.samples import answer_samples
from lowrank.report.events import EvalDone
from lowrank.report.page import write_report
from tests.pipelines.pictures.settings import settings
from tests.pipelines.test_train import run
from tests.tiny_vision_models import save_vision_folder


def test_commands_say_where_the_pictures_of_their_rows_are(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((world / "mllm.json").read_text("utf-8"))[:1]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    requested = ["--data", str(tmp_path / "rows.json"), "--media-dir", str(world), "--output", str(tmp_path / "out")]
    more = ["--metrics", "exact_match", "--max-new-tokens", "1", "--json"]
    with pytest.raises(SystemExit) as caught:
        main(["predict", str(world / "model"), *requested, *more])
    output = capsys.readouterr()
    assert caught.value.code == 0, output
    assert json.loads(output.out)["rows"] == 1
    info = {
        "mine": {
            "file_name": "rows.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
        }
    }
    info["mine"]["tags"] = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    (source,) = named_sources(["mine"], tmp_path, media_dir=str(world))
    assert source.media_folder == world
    with pytest.raises(SystemExit) as caught:
        main(["export", str(world / "model"), "--to", "merged", "--media-dir", str(world)])
    assert caught.value.code == 2
    assert "--prompts" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "paligemma"])
def test_a_model_is_asked_about_pictures(
    family: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(world / "model" if family == "qwen2_5_vl" else save_vision_folder(tmp_path / "model", family))
    request = PredictRequest(
        model, (SourceConfig(path=str(world / "mllm.json"), max_samples=2),), tmp_path / "out",
        metrics=("exact_match",), sampling=GenerationConfig(max_new_tokens=3),
    )  # fmt: skip
    result, verdicts = predict(request, lambda _: contextlib.nullcontext(lambda done, total: None), lambda _: None)
    assert (result["rows"], result["unanswered"]) == (2, {})
    assert verdicts["base"]["perplexity"].value.value > 1
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["prompt"][0]["images"][0].endswith(".jpg")

    thumbnails = json.loads((tmp_path / "out" / "thumbnails.json").read_text(encoding="utf-8"))
    assert set(thumbnails) == {name for line in lines for name in json.loads(line)["prompt"][0]["images"]}
    picture = Image.open(io.BytesIO(base64.b64decode(next(iter(thumbnails.values())).partition(",")[2])))
    assert (picture.format, max(picture.size)) == ("JPEG", 160)

    repl = ChatRepl(open_inference_model(model), GenerationConfig(max_new_tokens=3))
    repl.run_command(f"/image {world / 'pictures' / '0.jpg'}")
    assert "300 x 168, with the next question" in " ".join(capsys.readouterr().out.split())
    repl.send_quietly("What is it?")
    repl.send_quietly("And now?")
    assert [len(message.media) for message in repl.history] == [1, 0, 0, 0]
    with pytest.raises(DataError, match="a picture is missing"):
        repl.run_command("/image nowhere.png")


def test_a_script_shows_pictures(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, first, second = (str(world / each) for each in ("model", "pictures/0.jpg", "pictures/1.jpg"))

    def answers(*arguments: str, lines: str = "") -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        with pytest.raises(SystemExit) as ended:
            main(["chat", model, "--json", "--max-new-tokens", "8", *arguments])
        assert ended.value.code == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    (both,) = answers("--image", first, "--image", second, "-p", "What is it?")
    assert both["images"] == [first, second]
    (one,) = answers("--image", first, "-p", "What is it?")
    (none,) = answers("-p", "What is it?")
    assert "images" not in none
    assert len({each["answer"] for each in (both, one, none)}) > 1
    piped = answers(lines=f"/image {first}\nWhat is it?\nAnd now?\n")
    assert piped[0] == one
    assert "images" not in piped[1]
    monkeypatch.setattr("lowrank.serve.chat_backends.open_chat_backend", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as ended:
        main(["chat", model, "--image", "nowhere.png", "--image", "neither.png", "-p", "?"])
    assert ended.value.code == 3
    message = capsys.readouterr().err
    assert "nowhere.png" in message
    assert "neither.png" in message


def test_a_report_shows_what_was_asked_about(world: Path, tmp_path: Path) -> None:
    """A few held-out rows with pictures, answered before and after, in one file; Python's evaluate takes them too."""
    run(settings(world, tmp_path / "run", max_steps=1, eval_steps=None))
    answer_samples(tmp_path / "run", 2, lambda text: None)
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/jpeg;base64,') >= 2
    assert "img-src data:;" in page
    source = [json.loads((world / "mllm.json").read_text(encoding="utf-8"))[0]]
    source[0]["images"] = [str(world / each) for each in source[0]["images"]]
    measured = lowrank.evaluate(tmp_path / "run", source, metrics=(), adapters=["a"], max_new_tokens=2)
    assert measured.loc[("a", "perplexity"), "rows"] == 1


def test_while_it_trains_it_is_asked_with_its_pictures(world: Path, tmp_path: Path) -> None:
    """The metric is that of the same rows asked afterwards."""
    changes = {"eval_metric": "rougeL", "eval_max_new_tokens": 8, "max_steps": 40, "eval_steps": 40}
    _, recorder = run(
        settings(world, tmp_path / "run", **changes, jobs=[{"name": "a", "adapter": {"rank": 16}}], num_train_epochs=40)
    )
    done = [each for each in recorder.events if isinstance(each, EvalDone) and each.step == 40]
    request = PredictRequest(
        str(tmp_path / "run"), (SourceConfig(path=str(world / "mllm.json")),), tmp_path / "out", adapters=("a",),
        metrics=("rougeL",), sampling=GenerationConfig(max_new_tokens=8), perplexity=False,
    )  # fmt: skip
    _, verdicts = predict(request, lambda _: contextlib.nullcontext(lambda done, total: None), lambda _: None)
    assert done[-1].metrics["rougeL"] == pytest.approx(verdicts["a"]["rougeL"].value.value)
    assert done[-1].metrics["rougeL"] > 0

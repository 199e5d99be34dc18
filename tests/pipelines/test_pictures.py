"""Whole runs on pictures: jobs on one base, stopped and resumed to the same bits, and what is refused."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import lowrank
from lowrank.cli.chat_repl import ChatRepl
from lowrank.cli.main import main
from lowrank.compat.llamafactory.dataset_info import named_sources
from lowrank.config import RunConfig
from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.prepare import prepare
from lowrank.errors import DataError, ModelError
from lowrank.generate.request import GenerationConfig
from lowrank.models.config import ModelConfig
from lowrank.models.loading.quiet import quiet_transformers
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.pipelines.export_source import open_source
from lowrank.pipelines.inference import open_inference_model
from lowrank.pipelines.predict import PredictRequest, predict
from lowrank.pipelines.samples import answer_samples
from lowrank.pipelines.together import digest_of_data
from lowrank.pipelines.train import train
from lowrank.records import Conversation
from lowrank.report.events import EvalDone, Event, Notice, StepDone
from lowrank.report.page import write_report
from lowrank.serve.vllm_engine.adapters import refuse_own_rows
from tests.export.sources import write_merged
from tests.picture_rows import write_picture_rows
from tests.pipelines.test_train import Ear, Stopper, run, weights
from tests.tiny_vision_models import save_vision_folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_vision_folder(folder / "model", "qwen2_5_vl")
    write_picture_rows(folder)
    return folder


def settings(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(world / "model"), "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(world / "mllm.json")], "eval": [str(world / "mllm.json")], "batch_size": 2},
        "output_dir": str(out),
        "micro_batch_tokens": 400,
        "optimizer": {"learning_rate": 1e-2},
        "eval_steps": 4,
        "num_train_epochs": 3,
        "jobs": [
            {"name": "a", "adapter": {"rank": 4, "dropout": 0.1}},
            {"name": "b", "adapter": {"rank": 8}, "neftune_noise_alpha": 5.0},
        ],
        **changes,
    }


@pytest.mark.slow
def test_jobs_learn_and_resume_to_the_same_bits(world: Path, tmp_path: Path) -> None:
    _, whole = run(settings(world, tmp_path / "whole"))
    assert whole.losses("a")[-1] < whole.losses("a")[0] - 0.05
    stopper, given = Stopper(), settings(world, tmp_path / "cut")
    assert train(RunConfig(**given), reporters=[stopper])["interrupted"]
    _, rest = run({**given, "resume": True})
    for job in ("a", "b"):
        assert stopper.losses(job) + rest.losses(job) == whole.losses(job)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert one
    assert all(torch.equal(one[name], other[name]) for name in one)


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


def test_questions_whose_picture_is_broken_within_are_named_and_left_out_of_all_numbers(
    world: Path, tmp_path: Path
) -> None:
    write_picture_rows(tmp_path)
    path = tmp_path / "pictures" / "1.jpg"
    Image.open(path).save(path, "PNG")
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(400) + data[middle + 400 :])
    request = PredictRequest(
        str(world / "model"), (SourceConfig(path=str(tmp_path / "mllm.json")),), tmp_path / "out",
        metrics=("exact_match",), sampling=GenerationConfig(max_new_tokens=2),
    )  # fmt: skip
    notices: list[str] = []
    result, verdicts = predict(request, lambda _: contextlib.nullcontext(lambda done, total: None), notices.extend)
    assert (result["rows"], result["unanswered"]) == (6, {"base": 2})
    assert verdicts["base"]["perplexity"].rows == verdicts["base"]["exact_match"].rows == 4
    row = r"a broken picture: .*1\.jpg cannot be decoded: .* \(row 2 of mllm\.json\)"
    assert any(re.search(rf"no answer to 2 of 6 questions \({row}", each) for each in notices)
    assert any(re.search(rf"perplexity leaves out 2 of 6 questions \({row}", each) for each in notices)


def test_a_missing_picture_is_named_before_the_model_loads(world: Path, tmp_path: Path) -> None:
    write_picture_rows(tmp_path)
    for file in (tmp_path / "pictures").glob("*.jpg"):
        file.unlink()
    given = settings(world, tmp_path / "run", eval_steps=None, data={"train": [str(tmp_path / "mllm.json")]})
    given["model"]["path"] = str(tmp_path / "sighted")
    folder = save_vision_folder(tmp_path / "sighted", "llava")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match=r"6 rows .* of 6 left out: a picture is missing; the first: .*pictures/0.jpg"):
        train(RunConfig(**given))


@pytest.mark.parametrize("packs", [True, False])
def test_a_stream_may_show_its_first_picture_late(
    packs: bool, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the rows that are looked at beforehand. Where that would change the layout, they are left out, and it is
    said."""
    monkeypatch.setattr("lowrank.data.prepare._ROWS_AHEAD", 2)
    monkeypatch.setattr("lowrank.data.batching.dataloader._WINDOW", 2)
    write_picture_rows(tmp_path)
    rows = json.loads((tmp_path / "mllm.json").read_text("utf-8"))[:2]
    text = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."}]}
    lines = [json.dumps(each) + "\n" for each in (text, text, text, *rows, text)]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    data = {"train": [str(tmp_path / "rows.jsonl")], "streaming": True, "batch_size": 1, "shuffle": False}
    given = settings(world, tmp_path / "run", data=data, eval_steps=None, max_steps=7)
    given["jobs"] = given["jobs"][:1]
    if not packs:
        monkeypatch.setattr("lowrank.models.checks.media_isolation._what_leaks", lambda base: "it mixes them up")
    _, ear = run(given)
    tokens = [event.tokens for event in ear.events if isinstance(event, StepDone)]
    notices = [event.text for event in ear.events if isinstance(event, Notice)]
    found = [each for each in notices if "no row that was read of the stream so far has pictures" in each]
    if not packs:
        assert len(set(tokens)) == 1
        assert re.search("are left out, since .* in the packed layout: .*put a row with pictures", found[0])
        assert any("2 rows" in each and "loaded without" in each for each in notices)
    else:
        assert [each > tokens[0] for each in tokens] == [False, False, False, True, True, False, False]
        assert not found


class Breaks:
    """A reporter during whose run a file breaks or goes: after step `at` of job a, what `harm` does."""

    def __init__(self, at: int, harm: Callable[[], None]) -> None:
        self.at, self.harm, self.losses, self.evaluations = at, harm, list[float](), list[tuple[str, int, float]]()

    def report(self, event: Event) -> None:
        if isinstance(event, EvalDone):
            self.evaluations.append((event.job, event.step, event.loss))
        if isinstance(event, StepDone) and event.job == "a":
            self.losses.append(event.loss)
            if event.step == self.at:
                self.harm()

    def close(self) -> None:
        pass


@pytest.mark.parametrize("harm", ["vanishes", "broken within", "held out"])
def test_a_run_that_meets_a_broken_file_names_its_row_and_goes_on_from_there(
    harm: str, world: Path, tmp_path: Path
) -> None:
    """To the same bits as if nothing had been, once the file is whole again."""
    write_picture_rows(tmp_path)
    path = tmp_path / ("held.jpg" if harm == "held out" else "pictures/1.jpg")
    held = [
        {"messages": json.loads((tmp_path / "mllm.json").read_text("utf-8"))[1]["messages"], "images": ["held.jpg"]}
    ]
    (tmp_path / "held.json").write_text(json.dumps(held), encoding="utf-8")
    (tmp_path / "held.jpg").write_bytes((tmp_path / "pictures" / "1.jpg").read_bytes())
    if harm == "broken within":
        Image.open(path).save(path, "PNG")
    whole = path.read_bytes()
    data = {"train": [str(tmp_path / "mllm.json")], "eval": [str(tmp_path / "held.json")], "batch_size": 1}
    given = settings(world, tmp_path / "run", data=data, eval_steps=5, max_steps=8)
    given["jobs"] = [{"name": "a", "adapter": {"rank": 4, "dropout": 0.1}}]
    _, plain = run({**given, "output_dir": str(tmp_path / "plain")})

    if harm == "broken within":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes(400) + whole[middle + 400 :])
    breaks = Breaks(1, path.unlink if harm != "broken within" else lambda: None)
    with pytest.raises(DataError) as caught:
        train(RunConfig(**given), reporters=[breaks])
    kind = "a broken picture" if harm == "broken within" else "a picture is missing"
    row = "row 1 of held.json" if harm == "held out" else r"row [25] of mllm.json"
    assert re.search(rf"{kind}: .*{path.name} .*\({row}\)", str(caught.value))
    assert re.search(r"step \d, written now \(resume=true\).*check_pictures: decode", str(caught.value), re.DOTALL)
    path.write_bytes(whole)
    assert len(breaks.losses) < 8
    _, rest = run({**given, "resume": True})
    assert breaks.losses + rest.losses("a") == plain.losses("a")
    assert breaks.evaluations + evaluations(rest) == evaluations(plain)
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_stream_of_pairs_that_meets_a_broken_file_goes_on_from_there(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its references are computed as its steps are read, before the step itself."""
    monkeypatch.setattr("lowrank.data.prepare._ROWS_AHEAD", 1)
    monkeypatch.setattr("lowrank.data.batching.dataloader._WINDOW", 1)
    write_picture_rows(tmp_path)
    last, whole = tmp_path / "last.png", noise(world)
    last.write_bytes(whole)
    pairs = [
        {"prompt": "<image>Who?", "chosen": f"A player {name}.", "rejected": "Nobody at all.", "images": [name]}
        for name in ("pictures/0.jpg", "pictures/1.jpg", "pictures/2.jpg", last.name)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    data = {"train": [str(tmp_path / "pairs.jsonl")], "streaming": True, "batch_size": 1, "shuffle": False}
    given = settings(world, tmp_path / "run", data=data, eval_steps=None, max_steps=5, objective={"type": "dpo"})
    given["jobs"] = given["jobs"][:1]
    _, plain = run({**given, "output_dir": str(tmp_path / "plain")})
    breaks = Breaks(1, last.unlink)
    with pytest.raises(DataError, match=re.compile("row 4.*step 3, written now.*check_pictures", re.DOTALL)):
        train(RunConfig(**given), reporters=[breaks])
    last.write_bytes(whole)
    _, rest = run({**given, "resume": True})
    assert breaks.losses + rest.losses("a") == plain.losses("a")


def evaluations(ear: Ear) -> list[tuple[str, int, float]]:
    return [(event.job, event.step, event.loss) for event in ear.events if isinstance(event, EvalDone)]


def test_an_evaluation_that_a_broken_file_has_put_off_is_made_up_for(world: Path, tmp_path: Path) -> None:
    """Also of a job that was over by then: which adapter is its best depends on it."""
    write_picture_rows(tmp_path)
    held, whole = tmp_path / "held.png", noise(world)
    held.write_bytes(whole)
    row = {"messages": json.loads((tmp_path / "mllm.json").read_text("utf-8"))[1]["messages"], "images": [held.name]}
    (tmp_path / "held.json").write_text(json.dumps([row]), encoding="utf-8")
    data = {"train": [str(tmp_path / "mllm.json")], "eval": [str(tmp_path / "held.json")], "batch_size": 1}
    given = settings(world, tmp_path / "run", data=data, eval_steps=2)
    given["jobs"] = [
        {"name": "a", "adapter": {"rank": 4}, "max_steps": 4},
        {"name": "b", "adapter": {"rank": 2}, "max_steps": 5, "early_stopping_patience": 9},
    ]
    _, plain = run({**given, "output_dir": str(tmp_path / "plain")})
    breaks = Breaks(3, held.unlink)
    with pytest.raises(DataError, match="the checkpoint of step 4, written now"):
        train(RunConfig(**given), reporters=[breaks])
    assert (tmp_path / "run" / "a" / "last").is_dir()
    held.write_bytes(whole)
    summary, rest = run({**given, "resume": True})
    assert breaks.evaluations + evaluations(rest) == evaluations(plain)
    assert summary["jobs"]["a"]["last_eval"]["step"] == 4
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)


def noise(world: Path) -> bytes:
    """A picture that no other row shows."""
    file = io.BytesIO()
    Image.open(world / "pictures" / "0.jpg").rotate(180).save(file, "PNG")
    return file.getvalue()


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
    repl._line(f"/image {world / 'pictures' / '0.jpg'}")
    assert "300 x 168, with the next question" in " ".join(capsys.readouterr().out.split())
    repl.send_quietly("What is it?")
    repl.send_quietly("And now?")
    assert [len(message.media) for message in repl.history] == [1, 0, 0, 0]
    with pytest.raises(DataError, match="a picture is missing"):
        repl._line("/image nowhere.png")


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


def test_other_pictures_are_other_data(world: Path, tmp_path: Path) -> None:
    """Of equal sizes, so that the tokens are the same: what several machines compare before they train together."""
    tokenizer = load_tokenizer(ModelConfig(path=str(world / "model")))

    def digest(folder: Path) -> str:
        config = DataConfig(train=(str(folder / "mllm.json"),))  # type: ignore[arg-type]
        return digest_of_data(prepare(config, tokenizer=tokenizer, record=Conversation, seed=0))

    write_picture_rows(tmp_path)
    assert digest(tmp_path) == digest(world)
    file = tmp_path / "pictures" / "1.jpg"
    with Image.open(file) as image:
        size = image.size
    Image.new("RGB", size, "red").save(file)
    assert digest(tmp_path) != digest(world)


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


def test_a_merged_model_looks_as_closely_as_in_training(world: Path, tmp_path: Path) -> None:
    given = settings(world, tmp_path / "run", max_steps=1, eval_steps=None, jobs=[{"name": "a"}])
    given["model"] |= {"image_max_pixels": 640, "image_min_pixels": 100}
    given["data"].pop("eval")
    train(RunConfig(**given))
    source = open_source(str(tmp_path / "run")).source
    assert source.facts["pictures"]
    out = write_merged(source, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "model", out))
    towers = [name for name in before if "visual" in name]
    assert len(towers) > 10
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in towers)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    read = [transformers.AutoImageProcessor.from_pretrained(folder, backend="pil") for folder in (world / "model", out)]
    assert [dict(each.size) for each in read] == [
        {"shortest_edge": 64, "longest_edge": 1024},
        {"shortest_edge": 100, "longest_edge": 640},
    ]
    rest = [{key: value for key, value in each.to_dict().items() if key != "size"} for each in read]
    assert rest[0] == rest[1]


def test_an_adapter_on_the_tower_goes_home_whole(world: Path, tmp_path: Path) -> None:
    """PEFT loads it, and the merged model looks as it does."""
    adapter = {"rank": 2, "freeze_vision_tower": False, "freeze_multi_modal_projector": False}
    given = settings(world, tmp_path / "run", max_steps=2, eval_steps=None, jobs=[{"name": "a", "adapter": adapter}])
    given["data"].pop("eval")
    run(given)
    source = open_source(str(tmp_path / "run")).source
    assert source.adapter is not None
    assert sum("visual" in name for name in source.adapter.targets) == 12
    out = write_merged(source, tmp_path / "out")
    merged = load_file(out / "model.safetensors")
    with quiet_transformers():
        model = transformers.AutoModelForMultimodalLM.from_pretrained(world / "model")
        twin = peft.PeftModel.from_pretrained(model, str(tmp_path / "run" / "a" / "last")).merge_and_unload()
        twin.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    before = load_file(world / "model" / "model.safetensors")
    assert merged.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)
    assert any("visual" in name and not torch.equal(merged[name], before[name]) for name in before)
    with pytest.raises(ModelError, match=r"adapters on model.visual.*beside the language model, which vLLM leaves out"):
        refuse_own_rows(tmp_path / "run" / "a" / "last", ModelConfig(path=str(world / "model")))

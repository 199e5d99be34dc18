"""Runs that meet a broken or missing picture: its row is named, and the run goes on from there."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from lowrank.config import RunConfig
from lowrank.data.config import SourceConfig
from lowrank.errors import DataError
from lowrank.generate.request import GenerationConfig
from lowrank.pipelines.predict import PredictRequest, predict
from lowrank.pipelines.train import train
from lowrank.report.events import EvalDone, Event, StepDone
from tests.picture_rows import write_picture_rows
from tests.pipelines.pictures.settings import settings
from tests.pipelines.test_train import Ear, run, weights
from tests.tiny_vision_models import save_vision_folder


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


def noise(world: Path) -> bytes:
    """A picture that no other row shows."""
    file = io.BytesIO()
    Image.open(world / "pictures" / "0.jpg").rotate(180).save(file, "PNG")
    return file.getvalue()


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

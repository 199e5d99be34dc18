"""The packaged base that sees: it says what was drawn, and learns from pictures to answer in a new form."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import lowrank
from lowrank.config import validate_settings
from lowrank.errors import DataError
from lowrank.models.packaged import locate
from lowrank.pipelines.train import train

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-vision"


@pytest.fixture(scope="module")
def shapes() -> ModuleType:
    """The example's own script."""
    spec = importlib.util.spec_from_file_location("shapes", EXAMPLE / "shapes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["shapes"] = module  # where its dataclass looks for annotations
    spec.loader.exec_module(module)
    return module


def shown(image: Any, question: str) -> list[dict[str, Any]]:
    """As OpenAI's clients send a picture."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}],
        }
    ]


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in Path(locate("lowrank/tiny-vision")).glob("*")) < 3e6


def test_it_says_what_was_drawn(shapes: ModuleType) -> None:
    rng = random.Random("seen by nobody")
    drawn = [shapes.draw_groups(rng) for _ in range(20)]
    questions = [shown(shapes.picture(groups, rng), "What is on the picture?") for groups in drawn]
    answers = lowrank.load("lowrank/tiny-vision").generate(questions, max_new_tokens=24, temperature=0)
    expected = [" and ".join(each.en() for each in sorted(groups, key=lambda group: group.shape)) for groups in drawn]
    assert sum(answer == right for answer, right in zip(answers, expected)) >= 15, list(zip(answers, expected))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_skill_is_learned_from_pictures(shapes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact answers to held-out questions, in both languages, before and after the example's run."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "build" / "shapes"
    for part, rows in (("train", 4000), ("heldout", 200)):
        shapes.write_rows(folder, part, rows, random.Random(f"{part} 0"))
    train(validate_settings(yaml.safe_load((EXAMPLE / "shapes.yaml").read_text("utf-8"))))
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text("utf-8").splitlines()]
    questions, right = [], []
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        content = [
            {"type": "image", "path": str(folder / row["images"][0])},
            {"type": "text", "text": question.removeprefix("<image>")},
        ]
        questions.append([{"role": "user", "content": content}])
        right.append(answer)
    model = lowrank.load("runs/shapes")
    share = {
        name: sum(map(str.__eq__, model.generate(questions, name, max_new_tokens=12, temperature=0), right))
        / len(right)
        for name in ("base", *model.adapters)
    }
    assert share["base"] < 0.2, share
    assert share["default"] > 0.9, share


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ({"type": "image"}, "a picture is missing"),
        ({"type": "image", "path": "nowhere.png"}, "nowhere.png"),
        ({"type": "image", "image": b"no picture"}, "no picture"),
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "nothing is fetched"),
    ],
)
def test_parts_that_show_nothing_are_refused(part: dict[str, Any], problem: str) -> None:
    model = lowrank.load("lowrank/tiny-vision")
    with pytest.raises(DataError, match=problem):
        model.generate([{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}])

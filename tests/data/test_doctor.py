"""The doctor: its report, how a person sees it, and the command."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lowrank.cli.main import main
from lowrank.data.chat.characters import CharacterRenderer
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.data.prepare import examine
from lowrank.data.report.doctor import DataReport, render_report
from lowrank.records import Conversation, Message, Preference
from tests.data.made_tokenizers import tokenizer_of, trl_template


def row(number: int, answer: str) -> dict[str, str]:
    return {"instruction": f"Say {number}", "output": answer}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text(json.dumps(list(rows), ensure_ascii=False), encoding="utf-8")
    return str(path)


def in_characters(**settings: Any) -> DataReport:
    return examine(DataConfig(**settings), renderer=CharacterRenderer())


def shown(report: DataReport, width: int = 100, color: bool = False, marks: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=color, color_system="standard" if color else None, legacy_windows=False
    )
    console.print(render_report(report, marks=marks))
    return out.getvalue()


@pytest.mark.parametrize("streaming", [False, True])
def test_counts_lengths_and_shares(streaming: bool, tmp_path: Path) -> None:
    answers = ["x" * length for length in (1, 10, 20, 100)]
    path = write(
        tmp_path / "x.json", [*(row(n, answer) for n, answer in enumerate(answers)), row(3, answers[3]), row(5, "")]
    )
    report = in_characters(train=path, streaming=streaming)
    (dataset,) = report.datasets
    assert (dataset.read, dataset.used, report.train_samples) == (6, 5, 5)
    assert dataset.duplicates is not None
    assert dataset.duplicates.example == "row 5 repeats row 4"
    lengths = np.array([len("user: Say 0\nassistant: ") + len(answer) for answer in [*answers, answers[3]]])
    assert report.lengths is not None
    assert report.train_tokens == lengths.sum()
    assert report.learned_share == pytest.approx(231 / lengths.sum())
    assert (report.lengths.shortest, report.lengths.longest) == (lengths.min(), lengths.max())
    assert report.lengths.percentiles[50] == np.sort(lengths)[2]
    assert report.lengths.histogram == ((17, 32, 1), (33, 64, 2), (65, 128, 2))
    assert report.unit == "characters"


def test_a_pair_is_shown_as_chosen_and_rejected(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {number}", "chosen": "good", "rejected": "bad"} for number in range(2)]
    report = in_characters(train=write(tmp_path / "x.json", rows))
    assert report.to_json()["pairs_shown"]
    assert [sample[-1][0] for sample in report.shown[:2]] == ["good", "bad"]
    text = shown(report)
    places = [text.index(title) for title in ("pair 1: chosen", "pair 1: rejected", "pair 2: chosen")]
    assert places == sorted(places)
    assert "the rejected one is what is trained against" in " ".join(text.split())
    assert "sample 1" not in text
    plain = in_characters(train=write(tmp_path / "y.json", [row(1, "a")]))
    assert "sample 1" in shown(plain)
    assert "rejected" not in shown(plain)


def test_json_is_plain_and_complete(tmp_path: Path) -> None:
    report = in_characters(train=write(tmp_path / "x.json", [row(1, "a"), row(2, "")]))
    content = json.loads(json.dumps(report.to_json()))
    assert content["datasets"][0]["dropped"] == [
        {"what": "empty answer", "count": 1, "rows": ["row 2"], "example": "empty answer: turn 2"}
    ]
    assert content["losses"] == [f"{tmp_path}/x.json: 1 row (row 2) of 2 left out: empty answer: turn 2"]
    assert content["shown"][0] == [["user: Say 1\nassistant: ", 0.0], ["a", 1.0]]


def test_mixed_schemas_and_several_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.json", [row(1, "a"), row(2, "b")])
    write(tmp_path / "data" / "b.json", [{**row(3, "c"), "system": "s"}, row(4, "")])
    (dataset,) = in_characters(train=str(tmp_path / "data")).datasets
    assert {finding.what: finding.count for finding in dataset.schemas} == {
        "instruction, output": 3,
        "instruction, output, system": 1,
    }
    assert any("mixed schemas: 2 different sets of columns" in oddity for oddity in dataset.oddities)
    assert dataset.dropped[0].rows == ("b.json row 2",)


def test_a_person_reads_counts_reasons_and_the_mask(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [row(1, "yes"), row(2, ""), *(row(1, "yes") for _ in range(3))])
    report = in_characters(train=path, num_samples_shown=1)
    plain = " ".join(shown(report, marks=True).split())
    assert "1 row (row 2) of 5 left out: empty answer" in plain
    assert "3 rows (row 3, row 4, row 5) repeated" in plain
    assert "assistant: ⟦yes⟧" in plain
    assert "carry loss" in plain
    colored = shown(report, color=True)
    assert "\x1b[1;32myes\x1b[0m" in colored
    assert "\x1b[2muser: Say 1" in colored
    assert "nothing is lost" in shown(in_characters(train=write(tmp_path / "y.json", [row(1, "a")])))


def test_text_that_looks_like_markup_is_shown_as_it_is(tmp_path: Path) -> None:
    report = in_characters(train=write(tmp_path / "x.json", [row(1, "[bold]a[/bold] [/nonsense]")]))
    assert "[bold]a[/bold] [/nonsense]" in shown(report)


def test_tokens_and_shares_agree_with_the_renderer(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen2_5", trl_template("qwen2_5"))
    config = DataConfig(train=write(tmp_path / "x.json", [row(n, f"answer {n}") for n in range(10)]))
    renderer = Renderer(tokenizer, config)
    report = examine(config, renderer=renderer, record=Conversation)
    conversations = [
        Conversation((Message("user", f"Say {n}"), Message("assistant", f"answer {n}"))) for n in range(10)
    ]
    segments = [segment for rendering in renderer.render_many(conversations) for segment in rendering.segments]
    assert report.train_tokens == sum(map(len, segments))
    assert report.learned_share == sum(segment.weight_L.sum() for segment in segments) / report.train_tokens
    assert "".join(text for text, _ in report.shown[0]) == tokenizer.decode(segments[0].token_L)


def test_characters_of_a_pair_learn_only_its_answers() -> None:
    prompt = Conversation((Message("user", "Q"), Message("assistant", "早"), Message("user", "R")))
    (rendering,) = CharacterRenderer().render_many(
        [Preference(prompt, Message("assistant", "是"), Message("assistant", "🙂"))]
    )
    learned = [[text for text, weight in CharacterRenderer().show(segment) if weight] for segment in rendering.segments]
    assert learned == [["是"], ["🙂"]]


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["data", *arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_command_on_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.json", [row(1, "a")])
    code, out, _ = command(capsys, good)
    assert code == 0
    assert "1 samples to train on" in out
    bad = write(tmp_path / "bad.json", [row(1, "a"), row(2, "")])
    assert command(capsys, bad)[0] == 0
    code, out, err = command(capsys, bad, "--strict")
    assert code == 3
    assert "row 2" in " ".join(out.split())  # lines break where the path of the file makes them
    assert "strict: this data would be lost" in err
    code, out, _ = command(capsys, bad, "--json", "--strict")
    assert code == 3
    assert json.loads(out)["reports"][0]["datasets"][0]["used"] == 1
    assert command(capsys, str(tmp_path / "none.json"))[0] == 3
    assert command(capsys, good, "--format", "sharegpt")[0] == 3
    assert command(capsys, good, "data.max_length=3")[0] == 2


def test_command_on_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer_of("qwen2_5", trl_template("qwen2_5")).save_pretrained(str(tmp_path / "model"))
    write(tmp_path / "a.json", [row(n, "ab " * 50) for n in range(1, 5)])
    config = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": ["a.json"]},
        "output_dir": str(tmp_path / "run"),
        "jobs": [
            {"name": "one"},
            {"name": "two", "adapter": {"rank": 4}},
            {"name": "short", "data": {"max_length": 100}},
        ],
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    code, out, _ = command(capsys, str(tmp_path / "run.yaml"), "--json")
    assert code == 0
    first, second = json.loads(out)["reports"]
    assert first["of"].startswith("jobs one, two")
    assert second["of"].startswith("job short")
    assert first["unit"] == "tokens"
    assert not first["losses"]
    assert second["losses"]
    assert not (tmp_path / "run").exists()
    assert command(capsys, str(tmp_path / "run.yaml"), "data.max_length=100", "--strict")[0] == 3

"""report.html: whole, self-contained, in two languages, and nothing a model or a file says becomes markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lowrank.cli.main import main
from lowrank.config import RunConfig
from lowrank.errors import DataError, OutputError
from lowrank.pipelines.samples import answer_samples
from lowrank.pipelines.train import train
from lowrank.report.curves import Line, loss_chart
from lowrank.report.page import write_report
from tests.checkpoint_folder import save_checkpoint_folder

EVIL = "<script>alert(1)</script> & \u2028 'x'"
VOID = ("meta", "br", "path", "circle", "line")


class Page(HTMLParser):
    """What a page holds; fails where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_checkpoint_folder(folder / "model")
    rows = [{"instruction": f"Say {number} {EVIL}", "output": f"{number} {EVIL}"} for number in range(8)]
    (folder / "rows.json").write_text(json.dumps([*rows, {"instruction": "no answer", "output": ""}]), "utf-8")
    settings = {
        "model": {"path": str(folder / "model"), "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(folder / "rows.json")], "eval": [str(folder / "rows.json")], "batch_size": 2},
        "max_steps": 4,
        "eval_steps": 2,
        "eval_metric": "exact_match",
        "eval_max_new_tokens": 4,
        "output_dir": str(folder / "run"),
        "jobs": [{"name": "r4", "adapter": {"rank": 4}}, {"name": "中文"}],
    }
    train(RunConfig.model_validate(settings))
    return folder / "run"


def test_a_run_ends_with_its_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = (run / "report.html").read_text("utf-8")
    page = Page(written)
    names = [tag for tag, _ in page.tags]
    assert names.count("svg") == 2, "losses and scores"
    assert names.count("script") == 1
    outside = [value for tag, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "data")]
    assert outside == []
    assert "url(" not in written
    english, chinese = ([tag for tag, attrs in page.tags if attrs.get("lang") == language] for language in ("en", "zh"))
    assert len(chinese) >= len(english) - 1 > 20
    text = "".join(page.texts)
    for expected in ("r4", "中文", "of 9 left out", "planned peak", "exact match", "output_dir", "最佳验证"):
        assert expected in text, expected
    assert "alert(1)</script>" in text, "the sample is shown as text"
    with pytest.raises(SystemExit):
        main(["report", str(run), "--samples", "2"])
    requested = [
        json.loads(line) for line in (run / "predict/samples/predictions.jsonl").read_text("utf-8").split("\n")[:-1]
    ]
    assert len(requested) == 2
    assert all({"base", "r4"} <= each["predictions"].keys() for each in requested)
    page = Page((run / "report.html").read_text("utf-8"))
    assert "base (" in "".join(page.texts), "samples before and after"
    assert "perplexity" not in "".join(page.texts)
    with pytest.raises(SystemExit):
        main(
            ["predict", str(run), "--data", str(run.parent / "rows.json"), "--max-new-tokens", "3", "--metrics", "none"]
        )
    (torn,) = (run / "predict/rows").glob("predictions.jsonl")
    torn.write_text(torn.read_text("utf-8") + '{"prompt": [{"role', "utf-8")
    with pytest.raises(SystemExit):
        main(["report", str(run), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"report": str(run / "report.html")}
    page = Page((run / "report.html").read_text("utf-8"))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "perplexity" in "".join(page.texts)
    assert "base (" in "".join(page.texts), "samples before and after"
    assert "1 lines of predictions.jsonl are no answers" in "".join(page.texts)


def test_samples_need_held_out_rows_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": "m", "data": "rows.json", "output_dir": str(tmp_path)}))
    with pytest.raises(DataError, match=r"no job has held-out data \(data.eval\).*lowrank predict"):
        answer_samples(tmp_path, 2, print)


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no config\.json in it"):
        write_report(tmp_path)


def test_curves_are_of_bounded_size_and_a_spike_leaves_them_readable() -> None:
    line = Line("a", 0, train=[(float(step), 2.0 - step / 1e5 + (step == 7) * 1e9) for step in range(1, 20_001)])
    chart = loss_chart([line])
    assert chart is not None
    assert sum(len(each.d) for each in chart.drawn) < 20_000
    assert all(float(described) < 1e6 for _, described in chart.y_ticks)
    assert loss_chart([Line("a", 0)]) is None
    assert loss_chart([Line("a", 0, train=[(1.0, 1.0)])]) is not None

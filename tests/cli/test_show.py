"""`lowrank show`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lowrank.cli.main import main
from lowrank.cli.show import resolved
from lowrank.compat import load_any
from lowrank.config import validate_settings

SHORT = "model: lowrank/tiny\ndata: lowrank/demo\noutput_dir: runs/first\nadapter: {rank: 4}\n"
JOBS = (
    SHORT
    + "jobs:\n  - {name: a}\n  - {name: b, adapter: {rank: 8}, seed: 1, max_steps: 3}\n  - {name: c, adapter: rslora}\n"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["show", *arguments])
    assert caught.value.code == 0
    output = capsys.readouterr()
    return output.out, output.err


@pytest.mark.parametrize("text", [SHORT, JOBS])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_is_shown_is_the_same_configuration(
    file: Path, capsys: pytest.CaptureFixture[str], text: str, options: list[str]
) -> None:
    file.write_text(text)
    out, _ = show(capsys, str(file), "optimizer.learning_rate=1e-4", *options)
    again = file.with_name("again.json" if options else "again.yaml")
    again.write_text(out)
    config, warnings = load_any(again)
    assert config == load_any(file, ["optimizer.learning_rate=1e-4"])[0]
    assert warnings == []


def test_one_job_is_shown_without_a_list_of_jobs(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(SHORT)
    content = yaml.safe_load(show(capsys, str(file))[0])
    assert "jobs" not in content
    assert content["adapter"]["rank"] == 4


def test_jobs_show_only_what_differs(file: Path) -> None:
    file.write_text(JOBS)
    jobs = resolved(load_any(file)[0])["jobs"]
    assert [sorted(job) for job in jobs] == [["name"], ["adapter", "max_steps", "name", "seed"], ["adapter", "name"]]


def test_warnings_go_to_stderr(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(SHORT + "schedule: {num_cycles: 3}\n")
    out, err = show(capsys, str(file), "--json")
    assert json.loads(out)["schedule"]["num_cycles"] == 3
    assert err == "warning: schedule.num_cycles has no effect with type: cosine\n"


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(show(capsys, "--schema")[0])
    assert "micro_batch_tokens" in schema["properties"]


def test_a_llamafactory_file_is_shown_in_native_form(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    Path("data/mine.json").write_text("[]")
    file.write_text("model_name_or_path: a/b\ndo_train: true\ndataset: mine\noutput_dir: out\ntemplate: yi\n")
    out, err = show(capsys, str(file), "lora_rank=4")
    content = yaml.safe_load(out)
    assert content["model"]["path"] == "a/b"
    assert content["adapter"]["rank"] == 4
    assert content["data"]["train"][0]["path"] == "data/mine.json"
    assert "warning: template: a/b is not on this machine yet, so 'yi' was not compared" in err
    assert validate_settings(content) == load_any(file, ["lora_rank=4"])[0]

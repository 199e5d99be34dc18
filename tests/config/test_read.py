"""Reading files and overrides."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lowrank.compat import load_any
from lowrank.config import RunConfig, load, override, read_file, steps_of, validate_settings
from lowrank.config.paths import locate
from lowrank.dotted_keys import flat_settings
from lowrank.errors import ConfigError

SHORT = "model: lowrank/tiny\ndata: lowrank/demo\noutput_dir: runs/first\n"


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_three_lines_are_a_run(tmp_path: Path) -> None:
    config = load(write(tmp_path, SHORT))
    assert config.model.path == "lowrank/tiny"
    assert [job.name for job in config.jobs] == ["default"]
    assert [source.path for source in config.jobs[0].data.train] == ["lowrank/demo"]
    assert config.output_dir == Path("runs/first")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.e5", 1e5),
        ("-.5E+2", -50.0),
        (".inf", math.inf),
        ("12", 12),
        ("010", 10),
        ("0x1F", 31),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("true", True),
        ("~", None),
        ("", None),
        ("[1e-3, a]", [1e-3, "a"]),
        ("a: b", "a: b"),
        ("{a: b}", {"a": "b"}),
        ("Human: hi", "Human: hi"),
    ],
)
def test_plain_values_are_yaml_1_2(text: str, value: object) -> None:
    assert override({}, [f"key={text}"]) == {"key": value}


def test_exponents_in_files_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, SHORT + "optimizer: {learning_rate: 1e-4, eps: 1E-6}\n")
    assert read_file(path)["optimizer"] == {"learning_rate": 1e-4, "eps": 1e-6}


def test_anchors_and_merge_keys_still_work(tmp_path: Path) -> None:
    text = "base: &base {rank: 4, alpha: 8}\nadapter:\n  <<: *base\n  rank: 16\n"
    assert read_file(write(tmp_path, text))["adapter"] == {"rank": 16, "alpha": 8}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "seed: 1\nmodel: x\nseed: 2\n", r"a\.yaml, line 3, column 1: the key 'seed' is given twice"),
        ("a.yaml", "model: {path: [}\n", r"a\.yaml, line 1, column \d+"),
        ("a.yaml", "- 1\n", "expected settings .key: value., found a list"),
        ("a.yaml", "", "found nothing"),
        ("a.yaml", "x: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("a.json", '{"seed": 1, "seed": 2}', "the key 'seed' is given twice"),
        ("a.json", '{"seed": 1,\n "x" 2}', r"a\.json, line 2, column 6"),
    ],
)
def test_malformed_files_say_where(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_file(write(tmp_path, text, name))


def test_missing_and_wrongly_encoded_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        read_file(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("model: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_file(tmp_path / "latin.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfseed: 1\n")
    assert read_file(tmp_path / "bom.yaml") == {"seed": 1}


JOBS = SHORT + "adapter: {rank: 4}\njobs:\n  - {name: a}\n  - {name: b, adapter: {rank: 8}}\n"


@pytest.mark.parametrize("entry", ["jobs.1.adapter.rank=32", "jobs.b.adapter.rank=32"])
def test_overrides_reach_jobs_by_place_and_by_name(tmp_path: Path, entry: str) -> None:
    ranks = [job.adapter.rank for job in load(write(tmp_path, JOBS), [entry]).jobs]
    assert ranks == [4, 32]


def test_overrides_at_the_top_reach_jobs_that_leave_the_setting_alone(tmp_path: Path) -> None:
    config = load(
        write(tmp_path, JOBS), ["adapter.rank=2", "optimizer.learning_rate=1e-3", "data=lowrank/demo-heldout"]
    )
    assert [job.adapter.rank for job in config.jobs] == [2, 8]
    assert {job.optimizer.learning_rate for job in config.jobs} == {1e-3}
    assert {job.data.train[0].path for job in config.jobs} == {"lowrank/demo-heldout"}


def test_overrides_spell_out_short_forms() -> None:
    assert override({"adapter": "rslora"}, ["adapter.rank=3"]) == {"adapter": {"type": "rslora", "rank": 3}}
    assert override({"model": "m"}, ["model.dtype=float32"]) == {"model": {"path": "m", "dtype": "float32"}}
    assert override({}, ["data.train=[a.json, b.json]"]) == {"data": {"train": ["a.json", "b.json"]}}


def test_overrides_do_not_change_what_they_are_given() -> None:
    settings = {"adapter": {"rank": 1}, "jobs": [{"name": "a"}]}
    override(settings, ["adapter.rank=2", "jobs.a.seed=3"])
    assert settings == {"adapter": {"rank": 1}, "jobs": [{"name": "a"}]}


def test_all_bad_overrides_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        override(
            {"jobs": [{"name": "rank8"}], "seed": 1}, ["rank", "jobs.rank9.seed=1", "jobs.5.seed=1", "seed.x=1", "a=[1"]
        )
    message = str(caught.value)
    assert "'rank': expected key=value" in message
    assert "none of them is 'rank9'; did you mean 'rank8'?" in message
    assert "jobs has 1 entries, none of them is '5'" in message
    assert "seed is 1, not a group" in message
    assert "'[1' cannot be read as a value" in message


def test_what_the_command_line_says_is_not_laid_to_the_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: lowrank/tiny\ndata: {train: lowrank/demo}\noutput_dir: runs/a\n")
    for read in (load, load_any):
        with pytest.raises(ConfigError, match=r"run\.yaml with optimiser\.x=1 over it cannot be used:\n  - optimiser"):
            read(file, ["max_steps=2", "optimiser.x=1"])
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text("model_name_or_path: lowrank/tiny\nstage: sft\ndataset: alpaca\noutput_dir: runs/a\n")
    with pytest.raises(ConfigError, match=r"theirs\.yaml with lora_rnk=4 over it, read as LLaMA-Factory's, cannot be"):
        load_any(theirs, ["lora_rnk=4"])
    with pytest.raises(ConfigError, match=r"with a=1 b=2 c=3 and 1 more over it"):
        load_any(file, ["a=1", "b=2", "c=3", "d=4"])


def test_overriding_a_job_of_a_file_without_jobs() -> None:
    with pytest.raises(ConfigError, match="there is no list of jobs"):
        override({"model": "m"}, ["jobs.0.seed=1"])


def test_paths_are_looked_for_here_first_then_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "both.json").write_text("[]")
    (there / "beside.json").write_text("[]")
    (there / "base").mkdir()
    (there / "photos").mkdir()
    shown = "{path: both.json, media_dir: photos}"
    text = f"model: base\ndata: {{train: [{shown}, beside.json, org/on-the-hub]}}\noutput_dir: runs\n"
    write(there, text + "jobs: [{name: a, data: {eval: beside.json}}]\n")
    monkeypatch.chdir(here)
    config = load("../there/run.yaml")
    assert [source.path for source in config.jobs[0].data.train] == [
        "both.json",
        str(Path("../there/beside.json")),
        "org/on-the-hub",
    ]
    assert config.jobs[0].data.train[0].media_dir == str(Path("../there/photos"))
    assert config.jobs[0].data.eval[0].path == str(Path("../there/beside.json"))
    assert config.model.path == str(Path("../there/base"))
    assert config.output_dir == Path("runs")


def test_a_missing_file_is_told_with_every_place_and_with_the_other_mistakes(tmp_path: Path) -> None:
    text = "model: ./nowhere\ndata: {train: gone.json, chat_template: t.jinja, maxlength: 3}\noutput_dir: x\n"
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    message = str(caught.value)
    for expected in (
        f"data.train.0.path: 'gone.json' was not found; looked for {Path('gone.json').absolute()} and "
        f"{tmp_path / 'gone.json'}",
        "model.path: './nowhere' was not found",
        "data.chat_template: 't.jinja' was not found",
        "data.maxlength: unknown key; did you mean 'max_length'?",
    ):
        assert expected in message


def test_a_run_goes_through_json_and_back(tmp_path: Path) -> None:
    text = JOBS.replace("data: lowrank/demo\n", "") + (
        "save_steps: 0.25\neval_steps: null\nreport_to: [wandb]\n"
        "data: {train: [{path: lowrank/demo, columns: {prompt: q}}], chat_template_kwargs: {enable_thinking: false}}\n"
    )
    config = load(write(tmp_path, text), ["jobs.b.adapter.type=rslora", "jobs.a.adapter.rank_pattern={q_proj: 2}"])
    content = json.loads(json.dumps(config.model_dump(mode="json")))
    assert validate_settings(content) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert load(write(tmp_path, json.dumps(content), "run.json")) == config


@pytest.mark.parametrize(
    ("interval", "num_steps", "steps"),
    [(None, 30, None), (500, 30, 500), (0.1, 30, 3), (1 / 3, 30, 10), (0.1, 3, 1), (0.5, 7, 4), (0.07, 100, 7)],
)
def test_intervals_in_steps(interval: float | None, num_steps: int, steps: int | None) -> None:
    assert steps_of(interval, num_steps) == steps


def test_patterns_standard_input_and_paths_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "alpaca.json").write_text("[]", encoding="utf-8")
    (tmp_path / "loop.json").symlink_to("loop.json")
    assert locate("rows/*.json", tmp_path) == (str(tmp_path / "rows" / "*.json"), None)
    assert locate("-", tmp_path) == ("-", None)
    reported = {
        "rows/*.csv": "no file is named like 'rows/*.csv'; looked for",
        "rows/alpaka.json": "did you mean 'alpaca.json'?",
        "loop.json": "a symbolic link that leads in a circle",
        "x" * 5000 + ".json": "longer than the system allows",
        "a\0b.json": "it has a zero byte in it",
    }
    for path, text in reported.items():
        assert text in (locate(path, tmp_path)[1] or ""), path


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ('a."b.c"=1', {"a": {"b.c": 1}}),
        ('a."b=c".d=1', {"a": {"b=c": {"d": 1}}}),
        ('a."b\\"c"=1', {"a": {'b"c': 1}}),
        ("a.b=c=d", {"a": {"b": "c=d"}}),
        ('a="b.c"', {"a": "b.c"}),
        ('a.b"c=1', {"a": {'b"c': 1}}),
        ('a."b=1', {"a": {'"b': 1}}),
    ],
)
def test_a_key_with_dots_stands_in_quotes(entry: str, expected: dict[str, Any]) -> None:
    assert override({}, [entry]) == expected


@pytest.mark.parametrize("entry", ["a", "=1", "", 'a."b.c"'])
def test_words_that_are_no_setting(entry: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value"):
        override({}, [entry])


def test_flat_settings_are_read_back() -> None:
    settings = {"a": {"b.c": {"d": 1}, "": 2, 'q"': 3, '"r': 4, "{{s}}": 5, "t=u": 6, "none": {}}, "v": [1], "w x": 7}
    assert override({}, [f"{key}={json.dumps(value)}" for key, value in flat_settings(settings)]) == settings

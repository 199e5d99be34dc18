"""Settings that somebody made to hurt, or that somebody mistyped badly: one sentence, in bounded time and memory."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from lowrank.adapters.patterns import at_the_end, whole
from lowrank.compat import load_any
from lowrank.config import validate_settings
from lowrank.errors import ConfigError, LowrankError, ModelError, did_you_mean

PLAIN = "model: lowrank/tiny\noutput_dir: out\n"
FINE = PLAIN + "data: {train: lowrank/demo}\n"
BOMB = 'a0: &a0 ["x", "x", "x", "x", "x", "x", "x", "x", "x"]\n' + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
TEXTS = {
    "bomb in data": (BOMB + PLAIN + "data: {train: *a8}\n", "line 7.*aliases .* more than"),
    "bomb in jobs": (BOMB + FINE + "jobs: *a8\n", "aliases .* more than"),
    "bomb in a scalar": (BOMB + FINE + "seed: *a8\n", "aliases .* more than"),
    "itself": ("a: &a [*a]\n" + FINE, "line 1.*the value it is in"),
    "itself, merged": ("model: &m {<<: *m}\n", "the value it is in"),
    "itself, through another": ("a: &a {b: [{c: *a}]}\n" + FINE, "the value it is in"),
    "deep": (FINE + "x: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "deep mapping": (FINE + "x: " + "{a: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
    "digits": (FINE + f"seed: {'9' * 5000}\n", "5000 digits"),
    "hex digits": (FINE + f"seed: 0x{'f' * 5000}\n", "digits"),
    "large": (FINE + f"seed: {'9' * 60}\n", "seed: expected a number below"),
    "nan": (FINE + "num_train_epochs: .nan\n", "num_train_epochs: expected a finite number"),
    "inf": (FINE + "optimizer: {learning_rate: .inf}\n", "optimizer.learning_rate: expected a finite number"),
    "overflow": (FINE + "optimizer: {learning_rate: 1e999}\n", "optimizer.learning_rate: expected a finite number"),
    "nan in a list": (PLAIN + "data: {train: [{path: lowrank/demo, weight: .nan}]}\n", "weight: expected a finite"),
    "nan in a group": (FINE + "adapter: {alpha_pattern: {q_proj: .nan}}\n", "alpha_pattern.*finite number"),
    "rank": (FINE + "adapter: {rank: 1000000000000}\n", "adapter.rank: expected a number at most"),
    "rank_pattern": (FINE + 'adapter: {rank_pattern: {"(": 4}}\n', "rank_pattern: '\\(' is no regular expression"),
    "target": (FINE + 'adapter: {target_modules: "[a-"}\n', "target_modules: .* is no regular expression"),
    "long target": (
        FINE + f'adapter: {{target_modules: "{"a?" * 20000}"}}\n',
        "target_modules: a regular expression of",
    ),
    "object": (FINE + 'seed: !!python/object/apply:os.system ["true"]\n', "could not determine a constructor"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_yaml(name: str, tmp_path: Path) -> None:
    text, described = TEXTS[name]
    (tmp_path / "run.yaml").write_text(text)
    began = time.process_time()
    with pytest.raises(ConfigError, match=described) as caught:
        load_any(tmp_path / "run.yaml")
    assert time.process_time() - began < 5
    assert "run.yaml" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "described"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"model": ' + "9" * 5000 + "}", "5000 digits"),
        ('{"model": "m", "seed": NaN}', "seed"),
        ('{"a": 1, "a": 2}', "given twice"),
    ],
)
def test_json(text: str, described: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=described):
        load_any(tmp_path / "run.json")


def test_words_of_the_command_line_are_as_bounded() -> None:
    for entry in ("seed=" + "[" * 3000, "seed=&a [*a]", "seed=" + "9" * 5000):
        with pytest.raises(ConfigError):
            load_any("model=lowrank/tiny", ["data.train=lowrank/demo", "output_dir=o", entry])


def test_expressions_that_backtrack_end() -> None:
    began = time.process_time()
    name = "model.layers.0.self_attn.q_proj.model.layers.0" * 4
    slow = (r"(([a-z_.0-9]+)+)+x$", r"(([a-z_.0-9]+)+)+[xy]", r"(.*)*(.*)*(.*)*[xy]Z?", r"(a|a|b|[a-z_.0-9])*\d\dq")
    for pattern in slow:
        for match in (whole, at_the_end):
            with contextlib.suppress(ModelError):
                assert not match(pattern, name)
    assert time.process_time() - began < 20
    assert [at_the_end("q_proj|k_proj", name) for name in ("q_proj", "a.k_proj", "aq_proj", "q_proj.b")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_escape_codes_stay_text() -> None:
    with pytest.raises(ConfigError) as caught:
        validate_settings({"model": "m", "output_dir": "o", "\x1b[31mred\x07\x1b]0;title\x07": 1})
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("path", ["~/runs/x", "$HOME/runs/x", "${HOME}/runs/x"])
def test_home_is_home(path: str) -> None:
    found = validate_settings({"model": "lowrank/tiny", "data": "lowrank/demo", "output_dir": path})
    assert found.output_dir == Path.home() / "runs" / "x"


@pytest.mark.parametrize("jobs", [[], ()])
def test_no_jobs_and_a_mistake(jobs: Any) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.rnk: unknown key") as caught:
        validate_settings(
            {"model": "m", "data": "lowrank/demo", "output_dir": "o", "jobs": jobs, "adapter": {"rnk": 1}, "sed": 1}
        )
    assert "sed: unknown key; did you mean 'seed'?" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["config.json", "demo.json", "Config.JSON", "con.x", "lpt1", "..", ".", "a/b", "a.", "stop", "", "-a", 101 * "a"],
)  # fmt: skip
def test_names_that_are_no_folders_of_a_run(name: str) -> None:
    with pytest.raises(ConfigError, match=r"jobs\.0\.name"):
        validate_settings({"model": "m", "data": "lowrank/demo", "output_dir": "o", "jobs": [{"name": name}]})


@pytest.mark.parametrize(
    ("content", "described"),
    [
        ({"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_processes": 1}, "accelerate"),
        ({"zero_optimization": {"stage": 2}}, "DeepSpeed"),
        ({"base_model": "x", "datasets": []}, "axolotl"),
    ],
)
def test_files_of_others_are_called_what_they_are(content: dict[str, Any], described: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=described) as caught:
        load_any(tmp_path / "file.json")
    assert "\n" not in str(caught.value)


def test_unknown_keys_do_not_print_all_keys(tmp_path: Path) -> None:
    theirs = {"model_name_or_path": "x", "stage": "sft", "zzzz": 1, **{f"q{n}q": 1 for n in range(50)}}
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    with pytest.raises(LowrankError) as caught:
        load_any(tmp_path / "theirs.json")
    assert len(str(caught.value)) < 20_000
    (line,) = [line for line in str(caught.value).splitlines() if "zzzz" in line]
    assert line.endswith("; all are in docs/llamafactory.md")
    assert len(line) < 200


@pytest.mark.parametrize("place", [(), ("data",), ("model",), ("adapter",), ("optimizer",)])
def test_unknown_settings_name_a_few_and_where_all_are(place: tuple[str, ...]) -> None:
    settings: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "lowrank/demo"}, "output_dir": "o",
                                "adapter": {}, "optimizer": {}}  # fmt: skip
    group = settings[place[0]] if place else settings
    group["zzzz"] = 1
    with pytest.raises(ConfigError, match="zzzz: unknown key; ") as caught:
        validate_settings(settings)
    (line,) = [line for line in str(caught.value).splitlines() if "zzzz" in line]
    assert line.endswith("; all are in docs/settings.md")
    assert len(line) < 200


def test_long_lists_of_names_are_never_printed() -> None:
    names = [f"name{n}" for n in range(500)]
    assert len(did_you_mean("zzzz", names)) < 120

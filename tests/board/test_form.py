"""The form: every setting is reachable, what a person types becomes what the command reads, errors find their field."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank.board import form
from lowrank.board.export_llamafactory import as_llamafactory
from lowrank.board.main_settings import EXPORTS, GROUPS, PRESETS
from lowrank.board.places import Places
from lowrank.board.routes.new import _draft_of
from lowrank.board.settings_file import PATHS, as_overrides, settings_of
from lowrank.board.sweep_form import as_sweep, num_candidates, settings_of_jobs
from lowrank.compat import load_any
from lowrank.config import RunConfig
from lowrank.config.schema import JobSettings
from lowrank.errors import ConfigError
from lowrank.search.candidates import num_trials
from lowrank.search.config import SweepConfig

BASE = {"model.path": "lowrank/tiny", "data.train": ["lowrank/demo"]}


@pytest.fixture
def places(tmp_path: Path) -> Places:
    places = Places(tmp_path)
    places.make()
    return places


def read(settings: dict[str, Any], tmp_path: Path) -> RunConfig:
    """As `lowrank train` reads the file."""
    path = tmp_path / "run.yaml"
    path.write_text(form.as_yaml(settings), encoding="utf-8")
    return load_any(path)[0]


def test_defaults_are_those_of_the_command(places: Places, tmp_path: Path) -> None:
    config = read(settings_of(places, "x", BASE, [], {}), tmp_path).model_dump(mode="json")
    known = form.fields()
    wrong = {}
    for path, value in form.flat(config).items():
        if path in known and path not in ("model.path", "output_dir", "data.train"):
            wrong[path] = value
    assert not wrong, "a fresh configuration differs from what the form takes for the defaults"
    for path, default in form.DEFAULT_TYPES.items():
        value: Any = config
        for key in path.split("."):
            value = value[key]
        assert value == default


def test_every_setting_of_the_page_is_one(places: Places) -> None:
    known = form.fields()
    for paths in GROUPS.values():
        assert set(paths) <= set(known)
    assert len([path for paths in GROUPS.values() for path in paths]) <= 16
    for preset in PRESETS.values():
        assert set(preset) <= set(known)


@pytest.mark.parametrize("name", PRESETS)
def test_every_starting_point_is_valid(places: Places, tmp_path: Path, name: str) -> None:
    config = read(settings_of(places, "x", {**BASE, **PRESETS[name]}, [], {}), tmp_path)
    assert (
        form.flat(config.model_dump(mode="json")).items()
        >= {key: value for key, value in PRESETS[name].items() if form.fields()[key].default != value}.items()
    )


@pytest.mark.parametrize(
    ("path", "typed", "value"),
    [
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("optimizer.learning_rate", " 0.001 ", 0.001),
        ("adapter.rank", "8", 8),
        ("adapter.rank", "abc", "abc"),
        ("adapter.rank", "", None),
        ("max_steps", "10", 10),
        ("num_train_epochs", "2", 2.0),
        ("save_steps", "0.1", 0.1),
        ("save_steps", "100", 100),
        ("micro_batch_tokens", "auto", "auto"),
        ("micro_batch_tokens", "1024", 1024),
        ("model.activation_checkpointing", "3", 3),
        ("model.activation_checkpointing", "full", "full"),
        ("resume", "true", True),
        ("adapter.target_modules", "q_proj, v_proj", ["q_proj", "v_proj"]),
        ("adapter.rank_pattern", "{q_proj: 4}", {"q_proj": 4}),
        ("optimizer.betas", "0.8, 0.95", [0.8, 0.95]),
        ("data.default_system", "no", "no"),
        ("data.default_system", "1e-4", "1e-4"),
    ],
)
def test_what_is_typed(path: str, typed: str, value: Any) -> None:
    assert form.parsed(form.fields()[path], typed) == value


@pytest.mark.parametrize(
    "text", ["no", "1e-4", "null", "~", "12", "0x10", "true", "- a", "a: b", "#x", "'", "你好", "a\nb", ".5", "1_0"]
)
def test_texts_stay_texts_in_the_file(places: Places, tmp_path: Path, text: str) -> None:
    config = read(settings_of(places, "x", {**BASE, "data.default_system": text}, [], {}), tmp_path)
    assert config.jobs[0].data.default_system == text
    assert yaml.safe_load(form.as_yaml({"x": text})) == {"x": text}


def test_the_words_of_the_command_are_the_file(places: Places, tmp_path: Path) -> None:
    values = {
        **BASE, "adapter.rank": "8", "optimizer.learning_rate": "1e-4", "data.default_system": "it's: no",
        "model.storage.type": "nf4", "adapter.target_modules": "q_proj,v_proj",
    }  # fmt: skip
    jobs = [{"name": "a", "adapter.rank": "4"}, {"name": "b", "optimizer.learning_rate": "5e-5", "seed": ""}]
    settings = settings_of(places, "my run", values, jobs, {})
    first, *rest = as_overrides(settings)
    assert load_any(first, rest)[0] == read(settings, tmp_path)


def test_the_words_of_the_command_hold_keys_with_dots(places: Places, tmp_path: Path) -> None:
    pattern = {"layers.0.self_attn.q_proj": 4, r"layers\.1\..*(?=k_proj).*": 2, "v_proj": 3}
    settings = settings_of(places, "x", {**BASE, "adapter.rank_pattern": pattern}, [], {})
    first, *rest = as_overrides(settings)
    assert 'adapter.rank_pattern."layers.0.self_attn.q_proj"=4' in rest
    assert load_any(first, rest)[0] == read(settings, tmp_path)


def test_a_configuration_comes_back_as_the_form_it_was(places: Places, tmp_path: Path) -> None:
    values = {
        **BASE, "adapter.type": "dora", "adapter.rank": 8, "optimizer.type": "lion", "optimizer.learning_rate": 1e-5,
        "data.train": ["lowrank/demo", {"path": "lowrank/demo-heldout", "max_samples": 3}], "objective.type": "orpo",
        "schedule.type": "linear", "model.rope_scaling.factor": 2.0, "model.rope_scaling.type": "linear",
    }  # fmt: skip
    values = {key: value for key, value in values.items() if not key.startswith("model.rope")}
    config = read(settings_of(places, "x", values, [], {}), tmp_path)
    found = form.flat(config.model_dump(mode="json"))
    assert {key: found.get(key) for key in values} == values
    assert (
        read(settings_of(places, "x", {k: v for k, v in found.items() if k != "output_dir"}, [], {}), tmp_path)
        == config
    )


def test_a_default_is_that_of_the_type(places: Places, tmp_path: Path) -> None:
    field = form.fields()["adapter.rank"]
    assert field.default == 16
    other, default = next((name, value) for name, value in field.defaults if isinstance(value, int))
    for rank in (16, default, 5):
        settings = settings_of(places, "x", {**BASE, "adapter.type": other, "adapter.rank": str(rank)}, [], {})
        config = read(settings, tmp_path)
        assert config.jobs[0].adapter.model_dump()["rank"] == rank
        assert form.flat(config.model_dump(mode="json")).get("adapter.rank", default) == rank


def test_errors_find_their_field() -> None:
    message = (
        "run.yaml cannot be used:\n  - adapter.rank: expected a whole number, got 'abc'\n"
        "  - jobs.1.optimizer.learning_rate: expected a number above 0, got -1.0\n"
        "  - something general: of two lines\n    here"
    )
    found = [(one.path, one.text) for one in form.problems(message)]
    assert found[0] == ("adapter.rank", "expected a whole number, got 'abc'")
    assert found[1][0] == "jobs.1.optimizer.learning_rate"
    assert found[2][0] == ""
    assert form.problems("one sentence")[0].text == "one sentence"


def test_a_llamafactory_file_means_the_same_when_it_is_read_again(places: Places, tmp_path: Path) -> None:
    (places.uploads / "rows.json").write_text('[{"instruction": "a", "output": "b"}]', encoding="utf-8")
    (places.uploads / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}', encoding="utf-8")
    values = {
        "model.path": "lowrank/tiny", "data.train": ["data/rows.json"], "adapter.type": "dora", "adapter.rank": "8",
        "adapter.alpha": "32", "optimizer.learning_rate": "1e-4", "data.max_length": "512", "num_train_epochs": "2",
        "schedule.warmup_ratio": "0.1", "data.batch_size": "4", "model.storage.type": "nf4", "seed": "7",
    }  # fmt: skip
    settings = settings_of(places, "x", values, [], {})
    path = tmp_path / "theirs.yaml"
    path.write_text(as_llamafactory(settings), encoding="utf-8")
    theirs, ours = load_any(path, [f"dataset_dir={places.uploads}"])[0].jobs[0], read(settings, tmp_path).jobs[0]
    for group in ("adapter", "schedule", "seed", "num_train_epochs"):
        assert getattr(theirs, group) == getattr(ours, group), group
    assert theirs.optimizer.learning_rate == ours.optimizer.learning_rate
    assert theirs.data.max_length == ours.data.max_length
    assert theirs.data.batch_size == ours.data.batch_size
    text = as_llamafactory(
        settings_of(places, "x", {**values, "adapter.type": "vera", "model.dtype": "float32"}, [], {})
    )
    assert "#   adapter.type: vera" in text
    assert "#   model.dtype: float32" in text


SWEEP = [
    {"path": "adapter.rank", "how": "values", "text": "8, 16"},
    {"path": "optimizer.learning_rate", "how": "values", "text": "1e-4, 0.001"},
    {"path": "adapter.target_modules", "how": "choice", "text": "q_proj, v_proj; k_proj"},
    {"path": "adapter.dropout", "how": "uniform", "text": "0, 0.2"},
]


def test_a_search_comes_back_as_the_rows_it_was(places: Places, tmp_path: Path) -> None:
    values = {**BASE, "sweep.max_trials": "12", "sweep.search": "successive_halving", "data.validation_split": "0.1"}
    settings = settings_of(places, "x", values, [], {}, SWEEP)
    config = read(settings, tmp_path)
    assert config.sweep is not None
    assert config.sweep.grid == {"adapter.rank": (8, 16), "optimizer.learning_rate": (1e-4, 1e-3)}
    assert config.sweep.random["adapter.target_modules"].choice == (["q_proj", "v_proj"], ["k_proj"])
    assert len(config.jobs) == num_candidates(settings["sweep"]) == 12
    draft = _draft_of(config.model_dump(mode="json"), "x")
    assert not draft["jobs"], "they are the candidates"
    again = settings_of(places, "x", draft["values"], draft["jobs"], draft["extra"], draft["sweep"])
    assert read(again, tmp_path) == config


def test_candidates_are_counted_as_the_search_does(places: Places, tmp_path: Path) -> None:
    listed = [{"seed": 1}, {"seed": 2}]
    for more in ({}, {"max_trials": 3}, {"max_trials": 30}, {"candidates": listed}):
        sweep = {"grid": {"adapter.rank": [8, 16], "adapter.type": ["lora", "dora"]}, **more}
        assert num_candidates(sweep) == num_trials(SweepConfig(**sweep))
    drawn = {"random": {"adapter.dropout": {"uniform": [0, 1]}}, "max_trials": 5}
    assert num_candidates(drawn) == num_trials(SweepConfig(**drawn)) == 5
    assert num_candidates({"random": drawn["random"]}) == num_candidates(None) == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"path": "seed", "how": "uniform", "text": "1, 2, 3"}, "two numbers"),
        ({"path": "adapter.rank", "how": "values", "text": "4"}, "two rows"),
        ({"path": "seed", "how": "values", "text": "[1, [2"}, "cannot be read"),
        ({"path": "seed", "how": "values", "text": "[" * 20_000}, "cannot be read"),
    ],
)
def test_rows_that_are_no_search(places: Places, row: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of(places, "x", BASE, [], {}, [*SWEEP, row])


def test_what_candidates_can_have_is_what_jobs_have() -> None:
    groups = {path.partition(".")[0] for path in settings_of_jobs()}
    assert groups == set(JobSettings.model_fields)
    assert not {path for path in settings_of_jobs() if path not in form.fields() and path not in form.SOURCES}


def test_a_field_takes_no_bomb() -> None:
    """Aliases that stand for a billion values, as YAML on one line."""
    text = f"[&a [{','.join('1' * 20)}]"
    for one, other in zip("abcdefg", "bcdefgh"):
        text += f", &{other} [{','.join([f'*{one}'] * 20)}]"
    assert form.parsed(form.fields()["adapter.target_modules"], f"{text}]") == f"{text}]"
    with pytest.raises(ConfigError, match="cannot be read"):
        as_sweep([{"path": "seed", "how": "values", "text": f"{text}]"}])


def test_every_setting_that_names_a_file_is_known() -> None:
    """Whoever adds a setting whose value is a path: it belongs to PATHS, or the board would let it lead anywhere."""
    handled = {*PATHS, *form.SOURCES, "data.chat_template", "model.path", "output_dir"}
    spoken = {path for path, field in form.fields().items() if re.search(r"\b(folder|file)\b", field.help, re.I)}
    harmless = {"save_total_limit", "report_to", "adapter.trainable_token_indices"}
    texts = {path for path in spoken if form.fields()[path].kind in (form.TEXT, form.LIST)}
    assert texts - handled - harmless == set()


def test_every_card_of_exports_is_a_target() -> None:
    import pkgutil

    import lowrank.export.targets

    assert {name for name, _ in EXPORTS} == {
        module.name for module in pkgutil.iter_modules(lowrank.export.targets.__path__)
    }

"""The one door: what settings name runs only where a person allows it, wherever it is named."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import lowrank as lowrank_package
from lowrank.compat import load_any
from lowrank.config import settings_of_run, validate_settings
from lowrank.errors import ConfigError
from lowrank.models.loading.pretrained import TINY, locate
from lowrank.third_party import CodeRefused, code_allowed, code_is_allowed, load_code, names_code
from tests.command_line import lowrank

SETTINGS: dict[str, Any] = {"model": TINY, "data": {"train": "lowrank/demo"}, "output_dir": "out"}
PLACES = {
    "adapter": {"adapter": {"type": "evil:Thing"}},
    "objective": {"objective": "evil:Thing"},
    "optimizer": {"optimizer": {"type": "evil:Thing"}},
    "model.storage": {"model": {"path": TINY, "storage": "evil:Thing"}},
    "objective.reward_funcs.0": {"objective": {"type": "grpo", "reward_funcs": ["evil:judge"]}},
    "data.train.0.format": {"data": {"train": {"path": "lowrank/demo", "format": "evil:rows"}}},
    "data.eval.0.format": {"data": {"train": "lowrank/demo", "eval": {"path": "lowrank/demo", "format": "evil:rows"}}},
    "report_to.0": {"report_to": ["evil:Reporter"]},
    "jobs.1.optimizer": {"jobs": [{"name": "a"}, {"name": "b", "optimizer": "evil:Thing"}]},
}
EVIL = """
from pathlib import Path
Path(__file__).with_name("PWNED").write_text("code ran")

class Reporter:
    def __init__(self, output_dir):
        self.file = output_dir.parent / "heard.txt"
    def report(self, event):
        with open(self.file, "a") as file:
            file.write(type(event).__name__ + "\\n")
    def close(self): ...

def judge(completions, **columns):
    return [0.0 for _ in completions]
"""


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder holds evil.py, as a folder with a download may; what appears if its code runs."""
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", ".")] + [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return tmp_path / "PWNED"


def test_transformers_is_always_told_whether_a_files_code_may_run() -> None:
    """Where it is not, it asks whoever sits at the terminal, and a `y` opens a door beside ours."""
    silent = []
    for path in Path(str(lowrank_package.__file__)).parent.rglob("*.py"):
        text = path.read_text("utf-8")
        if "from_pretrained(" not in text and "from_config(" not in text:
            continue
        for call in (each for each in ast.walk(ast.parse(text)) if isinstance(each, ast.Call)):
            if not isinstance(call.func, ast.Attribute) or call.func.attr not in ("from_pretrained", "from_config"):
                continue
            if call.args and ast.unparse(call.args[0]) == "None":  # a class that is known, and no files
                continue
            if not {"trust_remote_code", None} & {each.arg for each in call.keywords}:  # None: **options
                silent.append(f"{path.name}:{call.lineno}")
    assert not silent


@pytest.mark.parametrize("place", PLACES)
def test_settings_are_refused_where_they_name_code(place: str, evil: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{place}: 'evil:\w+' is code.*--allow-code") as caught:
        validate_settings({**SETTINGS, **PLACES[place]})
    assert str(caught.value).count("\n") == 1
    assert not evil.exists()
    assert "evil" not in sys.modules


def test_a_file_does_not_open_the_door(evil: Path) -> None:
    """Not by any key, native or LLaMA-Factory's; and what is refused is refused in every face."""
    (evil.parent / "run.json").write_text(json.dumps({**SETTINGS, "allow_code": True, "report_to": ["evil:Reporter"]}))
    with pytest.raises(ConfigError, match=r"allow_code: unknown key"):
        load_any(evil.parent / "run.json")
    theirs = {
        "model_name_or_path": TINY, "trust_remote_code": True, "stage": "sft", "do_train": True, "dataset": "demo",
        "template": "default", "finetuning_type": "lora", "output_dir": "out", "report_to": "evil:Reporter",
    }  # fmt: skip
    (evil.parent / "dataset_info.json").write_text(json.dumps({"demo": {"file_name": "rows.json"}}))
    (evil.parent / "rows.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    (evil.parent / "theirs.json").write_text(json.dumps({**theirs, "dataset_dir": str(evil.parent)}))
    with pytest.raises(ConfigError, match=r"report_to\.0: 'evil:Reporter' is code"):
        load_any(evil.parent / "theirs.json")
    _, warnings = load_any(evil.parent / "theirs.json", ["report_to=none"])
    assert any("trust_remote_code has no effect without --allow-code" in each for each in warnings)
    assert not evil.exists()


def test_the_door() -> None:
    assert [names_code(name) for name in ("a.b:c", "a:b", "a", "a:", ":b", "a:b:c", "C:\\x", "a b:c", "os;x:y")] == [
        True, True, *[False] * 7,
    ]  # fmt: skip
    with pytest.raises(CodeRefused):
        load_code("json:dumps")
    with code_allowed():
        assert load_code("json:dumps") is json.dumps
        with code_allowed(False):
            assert code_is_allowed()
        with pytest.raises(ConfigError, match="cannot import 'json:nothing'"):
            load_code("json:nothing")
    assert not code_is_allowed()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    arguments = [
        "model=lowrank/tiny",
        "data.train=lowrank/demo",
        "data.max_samples=8",
        "data.batch_size=2",
        "max_steps=1",
    ]
    done = lowrank("train", *arguments, "adapter.rank=2", "output_dir=run", "--quiet", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


OF_THE_RUN = ("model", "report_to")


def tampered(run_folder: Path, beside: Path, **changes: Any) -> Path:
    """Somebody's run folder: its config.json says something else than what was trained."""
    copy = beside / "downloaded"
    shutil.copytree(run_folder, copy)
    config = json.loads((copy / "config.json").read_text("utf-8"))
    for each in (config, *config["jobs"]):
        each.update({name: value for name, value in changes.items() if each is config or name not in OF_THE_RUN})
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"type": "evil:Thing"}},
        {"objective": {"type": "evil:Thing"}},
        {"objective": {"type": "grpo", "reward_funcs": ["evil:judge"]}},
        {"report_to": ["evil:Reporter"]},
    ],
    ids=["optimizer", "objective", "reward", "reporter"],
)
def test_using_a_run_folder_runs_none_of_it(changes: dict[str, Any], run_folder: Path, evil: Path) -> None:
    copy = tampered(run_folder, evil.parent, **changes)
    done = lowrank("chat", str(copy), "-p", "hi", "--max-new-tokens", "2", cwd=evil.parent)
    assert done.returncode == 0, done.stderr
    assert not evil.exists()


def test_an_adapter_s_code_is_asked_for(run_folder: Path, evil: Path) -> None:
    copy = tampered(run_folder, evil.parent, adapter={"type": "evil:Thing"})
    with pytest.raises(ConfigError, match="'evil:Thing' is code"):
        settings_of_run(copy / "config.json")
    assert not evil.exists()


REMOTE = """
from pathlib import Path
Path({mark!r}).write_text("code ran")
from transformers import LlamaConfig, LlamaForCausalLM
class EvilConfig(LlamaConfig): model_type = "evilmodel"
class EvilModel(LlamaForCausalLM): config_class = EvilConfig
"""


@pytest.fixture
def remote(evil: Path) -> Path:
    """A base with code of its own."""
    base = evil.parent / "base"
    shutil.copytree(locate(TINY), base)
    config = json.loads((base / "config.json").read_text("utf-8"))
    config["auto_map"] = {"AutoConfig": "evilconf.EvilConfig", "AutoModelForCausalLM": "evilconf.EvilModel"}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "evilmodel"}))
    (base / "evilconf.py").write_text(REMOTE.format(mark=str(evil)))
    return base


def test_a_model_s_own_code_needs_the_person(run_folder: Path, remote: Path, evil: Path) -> None:
    model = {"path": str(remote), "trust_remote_code": True}
    copy = tampered(run_folder, evil.parent, model=model)
    for path in (str(copy), str(remote)):
        done = lowrank("chat", path, "-p", "hi", "--max-new-tokens", "2", cwd=evil.parent)
        assert done.returncode == 4, done.stdout + done.stderr
        assert "--allow-code" in done.stderr
        assert "Traceback" not in done.stderr
    assert not evil.exists()
    done = lowrank("chat", str(remote), "-p", "hi", "--max-new-tokens", "2", "--allow-code", cwd=evil.parent)
    assert done.returncode == 0, done.stderr
    assert evil.exists()


def test_a_reporter_of_one_s_own(evil: Path) -> None:
    arguments = [
        "model=lowrank/tiny",
        "data.train=lowrank/demo",
        "data.max_samples=8",
        "data.batch_size=2",
        "max_steps=1",
    ]
    arguments += ["output_dir=run", "report_to=[evil:Reporter]", "--quiet"]
    done = lowrank("train", *arguments, cwd=evil.parent)
    assert done.returncode == 2
    assert "report_to.0: 'evil:Reporter' is code" in done.stderr
    assert not evil.exists()
    done = lowrank("train", *arguments, "--allow-code", cwd=evil.parent)
    assert done.returncode == 0, done.stderr
    received = (evil.parent / "heard.txt").read_text().split()
    assert {"RunStarted", "StepDone", "RunFinished"} <= {*received}


def test_the_current_folder_hides_no_optional_package(tmp_path: Path) -> None:
    """A package that is not installed is not taken from the folder a person stands in."""
    for name in ("wandb", "mlflow", "swanlab"):
        (tmp_path / f"{name}.py").write_text("open('PWNED', 'w').write('code ran')")
    arguments = ["model=lowrank/tiny", "data.train=lowrank/demo", "output_dir=run", "report_to=[wandb,mlflow,swanlab]"]
    lowrank("train", *arguments, "max_steps=1", "data.max_samples=2", cwd=tmp_path)
    assert not (tmp_path / "PWNED").exists()

"""The ladder of examples runs, each on the base that ships with lowrank, a few steps of it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lowrank.config import RunConfig
from tests.command_line import lowrank
from tests.picture_rows import write_picture_rows
from tests.tiny_vision_models import save_vision_folder

ROOT = Path(__file__).parent.parent
OF_ITS_OWN = ("11_grpo", "12_ppo")
"""Four steps say nothing about their rewards."""
OF_PICTURES = ("15_pictures", "15_pictures.zh-CN")
"""The base that ships with lowrank does not see."""
LONG = {"08_sft_dpo_kto": "07_preferences", "14_sweep": "tests/search"}
"""Half a minute each; what does as much in every run of the tests."""
CONFIGS = [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in LONG else ())
    for path in sorted((ROOT / "examples").glob("[0-9]*.yaml"))
    if path.stem not in (*OF_ITS_OWN, *OF_PICTURES)
]
SCRIPTS = [
    pytest.param(path, marks=pytest.mark.slow if path.stem == "10_export" else ())
    for path in sorted((ROOT / "examples").glob("[0-9]*.py"))
]
"""10_export takes most of a minute; tests/pipelines/test_export.py does as much."""


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": "examples", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(*arguments: str) -> str:
    done = lowrank("train", *arguments, "--json", "--allow-code", cwd=ROOT, PYTHONPATH="examples")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.usefixtures("allowed_code")
def test_every_config_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    paths = [path for path in (ROOT / "examples").glob("[0-9]*.yaml") if path.stem != "04_llamafactory"]
    assert len(paths) == 13
    for path in paths:  # the one that is left out has other settings
        RunConfig(**yaml.safe_load(path.read_text("utf-8")))


@pytest.mark.parametrize("path", CONFIGS)
def test_config_trains(path: Path, tmp_path: Path) -> None:
    """Every step sees the same rows, so the loss must fall."""
    short = ["max_steps=3", "data.batch_size=8", "data.max_samples=8"]
    if "eval:" in path.read_text("utf-8"):
        short.append("eval_steps=3")
    out = train(str(path), f"output_dir={tmp_path / 'run'}", *short)
    summary = json.loads(out.splitlines()[-1])
    for job in summary["jobs"].values() if isinstance(summary["jobs"], dict) else summary["jobs"]:
        assert job["steps"] == 1 or job["last_loss"] < job["first_loss"]  # a search ends some of its candidates


@pytest.mark.parametrize("name", [OF_PICTURES[0], pytest.param(OF_PICTURES[1], marks=pytest.mark.slow)])
def test_pictures(name: str, tmp_path: Path) -> None:
    base, rows = save_vision_folder(tmp_path / "base", "qwen2_5_vl"), write_picture_rows(tmp_path)
    changes = (f"model.path={base}", f"data.train={rows}", f"output_dir={tmp_path / 'run'}", "max_steps=3")
    out = train(f"examples/{name}.yaml", *changes, "optimizer.learning_rate=1e-2")
    jobs = json.loads(out.splitlines()[-1])["jobs"]
    assert all(job["last_loss"] < job["first_loss"] for job in jobs.values())


@pytest.mark.parametrize("name", OF_ITS_OWN)
def test_answers_of_its_own(name: str, tmp_path: Path) -> None:
    """A step of answers is drawn and judged; nothing can be learned of it in two."""
    short = ("max_steps=2", "data.batch_size=2", "data.max_samples=8")
    out = train(f"examples/{name}.yaml", f"output_dir={tmp_path / 'run'}", *short)
    (job,) = json.loads(out.splitlines()[-1])["jobs"].values()
    assert job["steps"] == 2
    assert {"reward", "rewards/mentions/mean", "completions/mean_length"} <= job["eval_metrics"].keys()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_runs(path: Path) -> None:
    if path.stem == "02_sft":
        short = path.read_text("utf-8").replace("STEPS = 60", "STEPS = 4")
        assert "held out" in run(sys.executable, "-c", short)
    else:
        assert "held out" in run(sys.executable, str(path), "4")


INSIDE = {
    "02_sft.py": "a loop of one's own on the engine, which is inside",
    "unsloth_alpaca.py": "Unsloth's lines as they are, but for the first",
    "unsloth_alpaca.ipynb": "the same",
}


def _code_of(path: Path) -> str:
    text = path.read_text("utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def test_examples_import_little_and_by_the_front_door() -> None:
    folder = ROOT / "examples"
    paths = [
        path for kind in ("py", "ipynb") for path in (*folder.glob(f"*.{kind}"), *folder.glob(f"distributed/*.{kind}"))
    ]
    assert {path.name for path in paths} >= {"10_export.py", "quickstart.ipynb", "ray_train.py", *INSIDE}
    for path in paths:
        every = [node for node in ast.walk(ast.parse(_code_of(path))) if isinstance(node, (ast.Import, ast.ImportFrom))]
        ours = [line for line in map(ast.unparse, every) if "lowrank" in line]
        if not path.name.startswith("unsloth"):
            assert len(every) <= 5, (path.name, [ast.unparse(node) for node in every])
        assert path.name in INSIDE or set(ours) <= {"import lowrank"}, (path.name, ours)


def test_those_of_several_machines_are_what_their_programs_read() -> None:
    """Nobody here has a cluster: shells and Python parse them, and what they ask of lowrank is there."""
    folder = ROOT / "examples" / "distributed"
    for script in folder.glob("*.sh"):
        subprocess.run(["sh", "-n", str(script)], check=True)
    compile((folder / "ray_train.py").read_text("utf-8"), "ray_train.py", "exec")
    sky = yaml.safe_load((folder / "skypilot_sweep.yaml").read_text("utf-8"))
    texts = [sky["run"], *(path.read_text("utf-8") for path in folder.glob("*.sh"))]
    lines_of = [
        part for text in texts for line in text.splitlines() if "lowrank train" in line for part in line.split()
    ]
    settings = {part.partition("=")[0] for part in lines_of if "=" in part and not part.startswith("-")}
    assert settings == {"output_dir", "share", "resume"}
    assert settings <= {*RunConfig.model_fields}
    RunConfig(**yaml.safe_load((folder / "sharded.yaml").read_text("utf-8")))
    named = (folder / "README.md").read_text("utf-8")
    assert all(path.name in named for path in folder.iterdir() if path.name != "README.md")

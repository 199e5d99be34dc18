"""`lowrank chat`: whatever it is pointed at, asked from wherever, in every way a person asks."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lowrank.checkpoints.atomic import current
from lowrank.cli.chat_repl import ChatRepl, printable
from lowrank.cli.main import main
from lowrank.config import RunConfig
from lowrank.errors import ConfigError, ModelError
from lowrank.generate.sampler import GenerationConfig
from lowrank.pipelines.inference import InferenceModel, open_inference_model
from lowrank.pipelines.train import train
from lowrank.records import Conversation, Message
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca

BASE = {"dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run of two adapters and a run of all parameters, made from another current directory."""
    folder = tmp_path_factory.mktemp("world")
    save_checkpoint_folder(folder / "model")
    write_alpaca(folder / "train.json", 16)
    before = Path.cwd()
    os.chdir(folder)
    try:
        shared: dict[str, Any] = {
            "model": {"path": "model", **BASE},
            "data": {"train": ["train.json"], "batch_size": 4},
            "max_steps": 3,
        }
        jobs = [{"name": "r4", "adapter": {"rank": 4}}, {"name": "中文", "optimizer": {"learning_rate": 0.5}}]
        train(RunConfig.model_validate({**shared, "output_dir": "run", "jobs": jobs}))
        train(RunConfig.model_validate({**shared, "output_dir": "full", "tuning": "full"}))
    finally:
        os.chdir(before)
    (folder / "train.json").unlink()  # nobody needs it to talk
    return folder


@pytest.fixture(scope="module")
def trained(world: Path) -> InferenceModel:
    return open_inference_model(str(world / "run"))


def chat(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["chat", *arguments, "--max-new-tokens", "4"])
    output = capsys.readouterr()
    assert caught.value.code == code, output
    return output.out, output.err


@pytest.mark.parametrize(
    ("target", "model_name"),
    [("model", "base"), ("run", "r4"), ("run/中文/best", "中文"), ("full", "default"), ("full/default/last", "base")],
)
def test_it_talks_to_models_runs_and_adapters(
    world: Path, capsys: pytest.CaptureFixture[str], target: str, model_name: str
) -> None:
    out, err = chat(capsys, str(world / target), "-p", "你好", "--json")
    answer = json.loads(out)
    assert (answer["adapter"], answer["question"]) == (model_name, "你好")
    assert err == ""


def test_every_adapter_answers_as_itself(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = chat(capsys, str(world / "run"), "--adapter", "base,r4", "--adapter", "中文", "-p", "Say 3", "--json")
    answers = {line["adapter"]: line["answer"] for line in map(json.loads, out.splitlines())}
    assert list(answers) == ["base", "r4", "中文"]
    assert answers["中文"] != answers["base"]
    alone, _ = chat(capsys, str(world / "run" / "中文" / "best"), "-p", "Say 3", "--json")
    assert json.loads(alone)["answer"] == answers["中文"]
    beside = f"{world / 'run' / '中文' / 'best'},base"
    out, _ = chat(capsys, str(world / "model"), "--adapter", beside, "-p", "Say 3", "--json")
    rows = map(json.loads, out.splitlines())
    assert {row["adapter"]: row["answer"] for row in rows} == {name: answers[name] for name in ("中文", "base")}


def test_a_checkpoint_in_the_middle_of_training_talks(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint,) = (world / "run" / "checkpoints").iterdir()
    from_it, err = chat(capsys, str(checkpoint), "--adapter", "r4,中文,base", "-p", "Say 3", "--json")
    of_last, _ = chat(capsys, str(world / "run"), "--last", "--adapter", "r4,中文,base", "-p", "Say 3", "--json")
    assert from_it == of_last
    assert err == ""
    (full,) = (world / "full" / "checkpoints").iterdir()
    _, err = chat(capsys, str(full), "-p", "x", code=4)
    assert "give the run folder" in err


def test_a_merged_model_talks_as_its_adapter(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        str(world / "run"),
        "--to",
        "merged",
        "--adapter",
        "中文",
        "-o",
        str(tmp_path / "merged"),
        "--no-verify",
    ]
    with pytest.raises(SystemExit) as caught:
        main(["export", *arguments, "--dtype", "float32"])
    assert caught.value.code == 0, capsys.readouterr()
    capsys.readouterr()
    merged, _ = chat(capsys, str(tmp_path / "merged"), "-p", "Say 3", "--json")
    adapter, _ = chat(capsys, str(world / "run"), "--adapter", "中文", "-p", "Say 3", "--json")
    assert json.loads(merged)["adapter"] == "base"
    assert json.loads(merged)["answer"] == json.loads(adapter)["answer"]


def test_every_job_is_asked_by_the_template_it_was_trained_with(world: Path, tmp_path: Path) -> None:
    """Two jobs of one run, two templates: each answers in company as it does alone."""
    run = shutil.copytree(world / "run", tmp_path / "run", symlinks=True)
    config = json.loads((run / "config.json").read_text("utf-8"))
    config["jobs"][1]["data"]["chat_template"] = "alpaca"
    config["model"]["path"] = str(world / "model")
    (run / "config.json").write_text(json.dumps(config), "utf-8")
    mixed, plain = open_inference_model(str(run)), open_inference_model(str(world / "run"))
    assert mixed.renderer_of("r4") is mixed.renderer_of("base") is not mixed.renderer_of("中文")
    assert "### Instruction" in mixed.renderer_of("中文").chat_template
    question = Conversation((Message("user", "Say 3"),))
    own = open_inference_model(str(run), chat_template="alpaca").answer(
        [("中文", question)], GenerationConfig(max_new_tokens=6)
    )
    both = mixed.answer([("r4", question), ("中文", question)], GenerationConfig(max_new_tokens=6))
    assert both == [*plain.answer([("r4", question)], GenerationConfig(max_new_tokens=6)), *own]


def test_sampling_commands(trained: InferenceModel) -> None:
    talk = ChatRepl(trained, GenerationConfig(max_new_tokens=2), model_names=["r4"])
    for line in ("/temperature 0.7", "/top_p 0.9", "/top_k 5", "/min_p 0.1", "/penalty 1.2", "/seed 3"):
        talk.run_command(line)
    with pytest.raises(ConfigError, match="not a number that fits: '-1'"):
        talk.run_command("/top_k -1")
    found = talk.config
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.7, 0.9, 5, 0.1)
    assert (found.repetition_penalty, found.seed) == (1.2, 3)
    talk.run_command("/seed")
    assert talk.config.seed is None
    with talk.console.capture() as captured:
        talk.run_command("/template 中文")
    assert "an answer ends at '<|im_end|>'" in captured.get()


def test_a_diverged_voice_says_so_and_the_other_answers(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = open_inference_model(str(world / "run"))
    for parameter in trained.bank.parameters(trained.slot("r4")).values():
        parameter.data.fill_(float("nan"))
    trained.bank.refresh(trained.slot("r4"))
    talk = ChatRepl(trained, GenerationConfig(max_new_tokens=3), model_names=["r4", "base"])
    answers = talk.send_quietly("Say 3")
    assert answers["r4"] == ""
    assert (
        answers["base"]
        == ChatRepl(trained, GenerationConfig(max_new_tokens=3), model_names=["base"]).send_quietly("Say 3")["base"]
    )
    assert "r4: no answer: the probabilities are not finite" in capsys.readouterr().out


def test_a_pipe_is_one_conversation(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好\n\nand \xff?\n".encode("latin-1", "replace"))))
    out, _ = chat(capsys, str(world / "model"), "--json")
    assert len(out.splitlines()) == 2


def piped(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))


def test_commands_in_a_pipe_are_run(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "/adapter 中文", "/max 2", "hi", "/base", "/sampling", "/exit", "not asked")
    out, err = chat(capsys, str(world / "run"), "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["adapter"], row["question"]) for row in rows] == [("中文", "hi"), ("base", "hi")]
    assert "max_new_tokens 2" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [("/adpter r4", "line 2, /adpter r4: there is no /adpter; did you mean 'adapter'?"), ("/adapter r5", "'r5'"),
     ("/temperature hot", "line 2, /temperature hot: not a number that fits: 'hot'"), ("/base", "nothing was asked")],
)  # fmt: skip
def test_a_wrong_command_in_a_pipe_is_named(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    piped(monkeypatch, "", line, "hi")
    out, err = chat(capsys, str(world / "run"), code=4 if "r5" in line else 2)
    assert message in err
    assert out == ""


def test_side_by_side_shows_what_looks_like_markup(world: Path, trained: InferenceModel) -> None:
    talk = ChatRepl(trained, GenerationConfig(max_new_tokens=2), model_names=["base", "r4"])
    with talk.console.capture() as captured:
        talk._side_by_side({"base": "a [/INST] b", "r4": "\x1b[31mred"})
    assert "[/INST]" in captured.get()
    assert "\x1b[31m" not in captured.get()


@pytest.mark.parametrize(
    ("arguments", "code", "described"),
    [
        (["run", "--adapter", "r44"], 4, "did you mean 'r4'"),
        (["empty"], 4, "has no config.json, so it is no model's folder"),
        (["run", "--temperature", "-1"], 2, "--temperature"),
    ],
)
def test_mistakes_are_named(
    world: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, described: str
) -> None:
    (world / "empty").mkdir(exist_ok=True)
    _, err = chat(capsys, str(world / arguments[0]), *arguments[1:], "-p", "x", code=code)
    assert described in err


def test_a_run_without_adapters_says_so(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(world / "run" / "config.json", tmp_path / "run")
    _, err = chat(capsys, str(tmp_path / "run"), "-p", "x", code=4)
    assert "holds no trained adapter yet" in err
    shutil.copytree(current(world / "run" / "r4" / "last"), tmp_path / "run" / "r4" / "last")
    _, err = chat(capsys, str(tmp_path / "run"), "-p", "x")
    assert "no adapter yet: 中文" in err
    assert "r4 has no best yet, this is its last" in err


def test_a_conversation_longer_than_the_model_reads_is_refused(trained: InferenceModel) -> None:
    talk = ChatRepl(trained, GenerationConfig(max_new_tokens=8))
    with pytest.raises(ModelError, match="the model's maximum context length is 512"):
        talk.send_quietly("x" * 600)
    talk.send_quietly("x" * 470)  # fits, with few tokens left to answer


def test_a_model_without_a_template_takes_a_built_in_one(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(world / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("*.jinja"))
    _, err = chat(capsys, str(bare), "-p", "x", code=4)
    assert "has no chat template" in err
    assert "--chat-template" in err
    own, _ = chat(capsys, str(world / "model"), "-p", "x", "--json")
    given, _ = chat(capsys, str(bare), "-p", "x", "--json", "--chat-template", "chatml")
    assert given == own


def test_a_full_run_has_no_untouched_base(world: Path) -> None:
    assert list(open_inference_model(str(world / "full")).slots) == ["default"]


def test_printable() -> None:
    assert printable("a\x1b[2J\r\x07b\n\t中") == "a[2Jb\n\t中"


def test_at_a_terminal(world: Path) -> None:
    """Commands, completion, a mistake, and leaving, as a person would."""
    screen = _Screen([sys.executable, "-m", "lowrank", "chat", str(world / "run"), "--max-new-tokens", "4"])
    assert "also here: base, 中文" in screen.until("> ")
    assert "r4 · " in screen.type("Say 3\n")
    assert "/system" in screen.type("/sys\t")
    screen.type(" 你是诗人\n")
    assert "你是诗人" in screen.type("/template\n")
    assert "did you mean 'r4'" in screen.type("/adapter r44\n")
    screen.type("/adapter r4 base\n")
    assert re.search(r"┃.*r4.*┃.*base.*┃", screen.type("hello [/b]\n"))
    assert "not a number" in screen.type("/temperature -1\n")
    assert "there is no /nope" in screen.type("/nope\n")
    assert screen.leave() == 0
    assert "Traceback" not in screen.shown


class _Screen:
    """A child at a pseudo-terminal."""

    def __init__(self, command: list[str]) -> None:
        self.own, child = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment)
        os.close(child)
        self.shown = ""

    def until(self, end: str, seconds: float = 30) -> str:
        """What appears until it ends in `end` and nothing more comes."""
        new, deadline = b"", time.monotonic() + seconds
        while time.monotonic() < deadline:
            if select.select([self.own], [], [], 0.3)[0]:
                try:
                    new += os.read(self.own, 4096)
                except OSError:
                    break
            elif new.decode(errors="replace").replace("\x1b[?2004h", "").endswith(end):
                break
        text = new.decode(errors="replace")
        self.shown += text
        return text

    def type(self, text: str) -> str:
        os.write(self.own, text.encode())
        return self.until("> " if text.endswith("\n") else "")

    def leave(self) -> int:
        os.write(self.own, b"\x04")
        code = self.process.wait(timeout=30)
        os.close(self.own)
        return code

"""`lowrank chat` on a GGUF file: the answers of the model it was made from, LoRA files beside it, and its template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowrank.checkpoints.peft_layout import AdapterOnDisk
from lowrank.cli.chat_repl import ChatRepl
from lowrank.cli.main import main
from lowrank.errors import ModelError
from lowrank.generate.request import GenerationConfig
from lowrank.models.loading.pretrained import locate
from lowrank.pipelines.inference import InferenceModel
from lowrank.records import Conversation, Message
from lowrank.serve.chat_backends import open_chat_backend
from tests.serve.running import open_world

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

from lowrank.export.gguf.adapter import write_adapter_file
from lowrank.export.gguf.convert import convert, plan
from lowrank.export.gguf.model import read_folder

QUESTION = "Name a color."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, InferenceModel]:
    folder, source = tmp_path_factory.mktemp("gguf"), Path(locate("lowrank/tiny"))
    convert(source, folder / "tiny.gguf", "f32")
    trained = open_world()
    saved = trained.bank.saved(trained.slots["one"])
    tensors = {key: value.to(torch.float32) for key, value in saved.tensors.items()}
    write_adapter_file(
        plan(read_folder(source)), AdapterOnDisk(saved.config, tensors, saved.ranks), folder / "one.gguf"
    )
    return folder, trained


def chat(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["chat", *arguments])
    output = capsys.readouterr()
    assert caught.value.code == code, output
    return output.out, output.err


def test_base_and_lora_file_answer_as_in_torch(
    world: tuple[Path, InferenceModel], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, trained = world
    arguments = [str(folder / "tiny.gguf"), "--adapter", f"{folder / 'one.gguf'},base", "--max-new-tokens", "12"]
    out, err = chat(capsys, *arguments, "-p", QUESTION, "--json")
    answers = {line["adapter"]: line["answer"] for line in map(json.loads, out.splitlines())}
    requested = Conversation((Message("user", QUESTION),))
    right = trained.answer([("one", requested), ("base", requested)], GenerationConfig(max_new_tokens=12))
    assert list(answers.items()) == list(zip(("one", "base"), right))
    assert err == ""


def test_a_conversation(world: tuple[Path, InferenceModel], capsys: pytest.CaptureFixture[str]) -> None:
    """Streaming, history, /base, /system, /template and mistakes, on one open file."""
    folder, trained = world
    lora = [str(folder / "one.gguf")]
    backend = open_chat_backend(
        str(folder / "tiny.gguf"), adapters=lora, which="best", chat_template=None, notify=print
    )
    talk = ChatRepl(backend, GenerationConfig(max_new_tokens=8), system="Be brief.", model_names=["one"])
    with talk.console.capture() as captured:
        talk.send(QUESTION)
        talk.run_command("/base")
        talk.run_command("/template")
    requested = Conversation((Message("system", "Be brief."), Message("user", QUESTION)))
    one, base = trained.answer([("one", requested), ("base", requested)], GenerationConfig(max_new_tokens=8))
    streamed = capsys.readouterr().out
    assert streamed == f"{one}\n{base}\n"
    assert [message.content for message in talk.history] == ["Be brief.", QUESTION, one]
    shown = captured.get()
    assert "{%- for message in messages" in shown
    assert f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant" in shown
    assert "an answer ends at '<|im_end|>'" in shown
    with pytest.raises(ModelError, match="did you mean 'one'"):
        talk.run_command("/adapter ones")
    with pytest.raises(ModelError, match=r"\d+ tokens and the model's maximum context length is 1024"):
        talk.send("word " * 2000)
    assert len(talk.history) == 3, "what was refused was not said"


@pytest.mark.parametrize(
    ("arguments", "code", "described"),
    [
        (["--last"], 2, "--last chooses among the adapters of a run"),
        (["--adapter", "two"], 4, "there is no adapter 'two' here"),
        (["--adapter", "nowhere.gguf"], 4, "nowhere.gguf: no such file"),
        (["--chat-template", "chatmml"], 2, "did you mean 'chatml'"),
    ],
)
def test_mistakes_are_named(
    world: tuple[Path, InferenceModel],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    described: str,
) -> None:
    _, err = chat(capsys, str(world[0] / "tiny.gguf"), *arguments, "-p", "x", code=code)
    assert described in err

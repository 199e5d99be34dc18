"""One template everywhere: what training's tokenizer makes of a conversation, llama.cpp makes of the exported file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowrank.data.chat.template import without_marks
from lowrank.export.gguf.convert import convert
from lowrank.models.loading.pretrained import TINY, locate
from tests.data.made_tokenizers import tokenizer_of
from tests.export.gguf.families import save

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

SYSTEM, QUESTION = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}
ANSWER, CHINESE = {"role": "assistant", "content": "It is 4."}, {"role": "user", "content": "你好，请用中文再说一遍 🙂"}
TOOL = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}}  # fmt: skip
CHATS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [QUESTION]},
    "system": {"messages": [SYSTEM, QUESTION]},
    "empty system": {"messages": [{"role": "system", "content": ""}, QUESTION]},
    "several turns": {"messages": [SYSTEM, QUESTION, ANSWER, CHINESE]},
    "beginning of an answer": {"messages": [QUESTION, {"role": "assistant", "content": "It is"}]},
    "tools": {"messages": [QUESTION], "tools": [TOOL]},
}

_CHILD = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.warmup, params.n_parallel = sys.argv[1], 0, 512, False, 1
params.use_jinja = True
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
def ask(path, body):
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), kind)
    return json.loads(urllib.request.urlopen(request).read())
answers = {}
for name, chat in json.loads(sys.stdin.read()).items():
    prompt = ask("/apply-template", chat)["prompt"]
    found = ask("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})
    answers[name] = [prompt, found["tokens"]]
print("\\nANSWERS" + json.dumps(answers))
"""


def reported_by_llama_cpp(path: Path) -> dict[str, Any]:
    """(prompt, tokens) of every chat, by the server inside of llama.cpp; in a child, which its assertions may end."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(path)], input=json.dumps(CHATS), capture_output=True, text=True, timeout=120
    )
    assert "\nANSWERS" in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("\nANSWERS")[2])


def check(path: Path, tokenizer: Any) -> None:
    answers = reported_by_llama_cpp(path)
    for name, chat in CHATS.items():
        begun = chat["messages"][-1]["role"] == "assistant"
        expected = tokenizer.apply_chat_template(
            chat["messages"], tools=chat.get("tools"), add_generation_prompt=not begun, continue_final_message=begun,
            return_dict=False,
        )  # fmt: skip
        assert answers[name][1] == list(expected), (name, answers[name][0], tokenizer.decode(expected))


def test_the_shipped_base(tmp_path: Path) -> None:
    """Its template marks what is generated, which no program but transformers knows."""
    import shutil

    import transformers

    base = tmp_path / "base"
    shutil.copytree(locate(TINY), base)
    template = base / "chat_template.jinja"
    template.write_text(without_marks(template.read_text()))
    convert(base, tmp_path / "tiny.gguf", "f16")
    check(tmp_path / "tiny.gguf", transformers.AutoTokenizer.from_pretrained(locate(TINY)))


@pytest.mark.parametrize("family", ["qwen2_5", "llama3"])
def test_families(family: str, tmp_path: Path) -> None:
    """Their built-in templates; Llama 3 has a BOS, of which there must be one."""
    from lowrank.data.templates import choose

    tokenizer = tokenizer_of(family)
    text = without_marks(choose(tokenizer, {"qwen2_5": "qwen", "llama3": "llama3"}[family]))
    tokenizer.chat_template = text
    model = save("llama", tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    convert(tmp_path, tmp_path / "model.gguf", "f16")
    check(tmp_path / "model.gguf", tokenizer)

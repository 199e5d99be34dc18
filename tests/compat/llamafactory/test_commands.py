"""LLaMA-Factory's files and flags for chat, serve, export, predict and eval, and its names of commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lowrank
from lowrank.cli.main import main
from lowrank.compat import load_any
from lowrank.compat.llamafactory.commands import ELSEWHERE, translate
from lowrank.compat.llamafactory.flags import split_flags
from lowrank.compat.llamafactory.other_keys import known
from lowrank.errors import ConfigError

CHAT = "model_name_or_path: lowrank/tiny\ninfer_backend: huggingface  # choices\ntrust_remote_code: true\n"
EXPORT = CHAT + "export_dir: {out}\nexport_size: 5\nexport_device: cpu\nexport_legacy_format: false\n"
PREDICT = (
    "model_name_or_path: lowrank/tiny\nstage: sft\ndo_predict: true\nfinetuning_type: lora\neval_dataset: mine\n"
    "dataset_dir: data\ncutoff_len: 2048\nmax_samples: 3\noutput_dir: {out}\npredict_with_generate: true\n"
    "per_device_eval_batch_size: 1\nddp_timeout: 180000000\nmax_new_tokens: 4\n"
)
TRAIN = (
    "model_name_or_path: lowrank/tiny\nstage: sft\ndo_train: true\ndataset: mine\neval_dataset: mine\n"
    "dataset_dir: data\nmax_steps: 1\noutput_dir: {out}\nper_device_train_batch_size: 1\ncutoff_len: 64\n"
)
SAMPLING = ["--temperature", "0.95", "--top-p", "0.7", "--top-k", "50"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    rows = [{"instruction": f"Say {number}.", "input": "", "output": f"{number}!"} for number in range(4)]
    (tmp_path / "data" / "mine.json").write_text(json.dumps(rows))
    (tmp_path / "data" / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    monkeypatch.chdir(tmp_path)
    for name in ("API_HOST", "API_PORT", "API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def arguments_of(command: str, text: str, *more: str) -> list[str]:
    Path("theirs.yaml").write_text(text.format(out="out"))
    translated = translate([command, "theirs.yaml", *more])
    assert translated.arguments is not None
    return translated.arguments


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ("--stage sft --do_train --lora-rank 8", ["stage=sft", "do_train=true", "lora_rank=8"]),
        ("--max_steps -1 --bf16 --lr_scheduler_type=cosine", ["max_steps=-1", "bf16=true", "lr_scheduler_type=cosine"]),
        ("--no_double_quantization --save_only_model false", ["double_quantization=false", "save_only_model=false"]),
        ("--label_names a b --json", ["label_names=a,b", "--json"]),
    ],
)
def test_flags(flags: str, arguments: list[str]) -> None:
    given, others = split_flags(flags.split(), known())
    assert given + others == arguments


def test_chat(place: Path) -> None:
    arguments = arguments_of("chat", CHAT + "default_system: Be kind.\n", "temperature=0.5", "--json")
    assert arguments[:2] == ["chat", "lowrank/tiny"]
    assert arguments[2:] == ["--max-new-tokens", "1024", "--temperature", "0.5", "--top-p", "0.7", "--top-k", "50",
                         "--system", "Be kind.", "--json"]  # fmt: skip
    adapter = arguments_of("chat", CHAT + "adapter_name_or_path: saves/a\ndo_sample: false\n", "--max-new-tokens", "7")
    assert adapter == ["chat", "saves/a", "--base", "lowrank/tiny", "--max-new-tokens", "7"]


def test_python_loads_what_chat_takes(place: Path) -> None:
    Path("theirs.yaml").write_text(CHAT + "default_system: Be kind.\ndo_sample: false\nmax_new_tokens: 3\n")
    notes: list[str] = []
    theirs, plain = lowrank.load("theirs.yaml", notify=notes.append), lowrank.load("lowrank/tiny")
    kind = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who are you?"}]
    assert theirs.answers(["Who are you?"])[0].tokens == plain.answers([kind], max_new_tokens=3)[0].tokens
    assert theirs.answers([kind])[0].tokens == plain.answers([kind], max_new_tokens=3)[0].tokens
    longer = theirs.answers(["Who are you?"], max_new_tokens=5)[0]
    assert longer.prompt_tokens == plain.answers([kind], max_new_tokens=5)[0].prompt_tokens
    assert longer.tokens == plain.answers([kind], max_new_tokens=5)[0].tokens
    Path("theirs.yaml").write_text(CHAT + "adapter_name_or_path: saves/a\ntop_p: 3\n")
    with pytest.raises(ConfigError, match="top_p: expected a number at most 1"):
        lowrank.load("theirs.yaml")


def test_serve(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_PORT", "8123")
    text = CHAT.replace("huggingface", "vllm") + "template: llama3\n"
    assert arguments_of("serve", text) == [
        "serve", "lowrank/tiny", "--chat-template", "llama3", "--engine", "vllm", "--port", "8123"]  # fmt: skip


def test_export(place: Path) -> None:
    assert arguments_of("export", EXPORT) == ["export", "lowrank/tiny", "--output", "out", "max_shard_size=5GB"]
    several = arguments_of("export", EXPORT + "adapter_name_or_path: a,b\nexport_hub_model_id: me/it\n")
    assert several[1:6] == ["lowrank/tiny", "--adapter", "a,b", "--combine", "add"]
    assert several[-3:] == ["--push", "me/it", "max_shard_size=5GB"]
    gptq = arguments_of("export", EXPORT + "export_quantization_bit: 4\nexport_quantization_dataset: data/mine.json\n")
    assert gptq[-5:] == ["--to", "gptq", "bits=4", "calibration=data/mine.json", "max_shard_size=5GB"]


def test_predict_also_by_train(place: Path) -> None:
    expected = ["predict", "lowrank/tiny", "--max-new-tokens", "4", *SAMPLING, "--data", "mine", "--dataset-dir",
                "data", "--max-samples", "3", "--output", "out", "--seed", "42", "--llamafactory"]  # fmt: skip
    assert arguments_of("predict", PREDICT) == expected
    assert arguments_of("train", PREDICT) == expected


def test_eval(place: Path) -> None:
    text = "model_name_or_path: lowrank/tiny\ntask: mmlu_test\nlang: en\nn_shot: 3\nsave_dir: out\nbatch_size: 4\n"
    assert arguments_of("eval", text) == [
        "eval", "lowrank/tiny", "--tasks", "mmlu", "--num-fewshot", "3", "--output", "out"]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "text", "problem"),
    [
        ("train", CHAT, "theirs.yaml trains nothing .* `lowrank chat theirs.yaml` .or serve."),
        ("train", EXPORT, "theirs.yaml trains nothing .* `lowrank export theirs.yaml`"),
        ("export", CHAT, "export_dir: required"),
        ("export", EXPORT + "export_legacy_format: true\n", "pickles"),
        ("chat", CHAT + "adapter_name_or_path: a,b\n", "lowrank export lowrank/tiny --adapter a,b --combine add"),
        ("chat", CHAT + "quantization_bit: 4\n", "`lowrank quantize` writes"),
        ("chat", CHAT + "templte: llama3\n", "templte: unknown key; did you mean 'template'"),
        ("chat", CHAT + "top_p: 3\n", "top_p: expected a number at most 1"),
        ("predict", CHAT, "eval_dataset: required"),
        ("eval", CHAT, "task: required"),
    ],
)
def test_what_cannot_be_done_is_said(place: Path, command: str, text: str, problem: str) -> None:
    lines = {line.partition(":")[0]: line for line in text.format(out="out").splitlines()}  # the last of a key holds
    Path("theirs.yaml").write_text("\n".join(lines.values()) + "\n")
    with pytest.raises(ConfigError, match=problem):
        translate([command, "theirs.yaml"])


@pytest.mark.parametrize("command", sorted(ELSEWHERE))
def test_their_commands_are_answered(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "whatever.yaml"])
    assert end.value.code == 2
    assert "`lowrank " in capsys.readouterr().err


def test_flags_train_as_a_file_does(place: Path) -> None:
    text = TRAIN.format(out="out") + "lora_rank: 4\nlearning_rate: 1e-3\nbf16: true\nreport_to: none\n"
    Path("theirs.yaml").write_text(text)
    flags: list[str] = []
    for line in text.splitlines():
        key, _, value = line.partition(": ")
        flags += [f"--{key}"] if value == "true" else [f"--{key}", value]
    arguments = translate(["train", *flags]).arguments
    assert arguments is not None
    assert load_any(arguments[1], arguments[2:])[0] == load_any("theirs.yaml")[0]


def test_a_chat_file_answers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("theirs.yaml").write_text(CHAT + "max_new_tokens: 4\n")
    with pytest.raises(SystemExit) as end:
        main(["chat", "theirs.yaml", "--prompt", "hi", "--json"])
    assert end.value.code == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["question"] == "hi"
    assert "theirs.yaml is read as: lowrank chat lowrank/tiny" in output.err


@pytest.mark.slow
def test_predictions_follow_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = "do_predict: true\npredict_with_generate: true\nmax_new_tokens: 4\noverwrite_output_dir: true\n"
    Path("theirs.yaml").write_text(TRAIN.format(out="out") + more)
    with pytest.raises(SystemExit) as end:
        main(["train", "theirs.yaml", "--quiet"])
    assert end.value.code == 0, capsys.readouterr().err
    lines = Path("out/predict/generated_predictions.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["label"] for line in lines] == ["0!", "1!", "2!", "3!"]
    assert list(json.loads(Path("out/predict/metrics.json").read_text("utf-8"))["metrics"]) == ["default"]


def test_what_follows_training_is_checked_before_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for more, problem in (
        ("push_to_hub: true\n", "needs hub_model_id"),
        ("push_to_hub: true\nhub_model_id: me/it\n", "set HF_TOKEN"),
        ("do_predict: true\neval_dataset: gone\ndataset_dir: nowhere\n", "there is no dataset_info.json"),
    ):
        lines = {line.partition(":")[0]: line for line in (TRAIN.format(out="out") + more).splitlines()}
        Path("theirs.yaml").write_text("\n".join(lines.values()) + "\n")
        with pytest.raises(ConfigError, match=problem):
            translate(["train", "theirs.yaml"])

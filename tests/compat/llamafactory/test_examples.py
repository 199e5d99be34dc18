"""Every file of LLaMA-Factory's examples/ folder does what the table in docs/llamafactory.md says of it.

`examples.json` has the settings in each. Read: all of them. Run, with the paths of this machine, one step
and the tiny base: those that run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from lowrank.cli.expand import expand_model
from lowrank.cli.main import main
from lowrank.compat import load_any
from lowrank.compat.llamafactory.commands import translate
from lowrank.compat.llamafactory.flags import split_flags
from lowrank.compat.llamafactory.other_keys import known
from lowrank.compat.llamafactory.page import EXAMPLES
from lowrank.errors import ConfigError
from lowrank.export.merge.resize_vocabulary import add_tokens
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import locate
from tests.picture_rows import write_picture_rows
from tests.tiny_vision_models import save_vision_folder

HERE = Path(__file__).parent
SETTINGS: dict[str, Any] = json.loads((HERE / "examples.json").read_text("utf-8"))
TABLE: dict[str, tuple[str, str]] = json.loads(EXAMPLES.read_text("utf-8"))
RUNNING = [path for path, (state, _) in TABLE.items() if state not in ("none", "refused")]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
QUICK = (
    "train_lora/qwen3vl_lora_sft.yaml", "train_lora/qwen3vl_lora_dpo.yaml", "v1/train_full/train_multimodal.yaml"
)  # fmt: skip
"""Run in every suite: those on pictures."""
REASONS = {
    "fp8": ("fp8: True is not supported",),
    "use_kt": ("use_kt: True is not supported",),
}
"""By a word of the table's reason: what the error says."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with datasets of the names that the examples use."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"instruction": f"Say {number}.", "input": "", "output": f"{number}!"} for number in range(6)]
    talk = [{"from": "human", "value": "Which is larger, 1 or 2?"}]
    better, worse = {"from": "gpt", "value": "2"}, {"from": "gpt", "value": "1"}
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    pairs = [{"conversations": talk, "chosen": better, "rejected": worse}] * 6
    rated = [{"messages": turns, "label": number % 2 == 0} for number in range(6)]
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    chat = {"formatting": "sharegpt", "columns": {"messages": "messages"}}
    info: dict[str, Any] = {
        name: {"file_name": "asked.json"}
        for name in ("identity", "alpaca_en_demo", "alpaca_zh_demo", "alpaca_zh", "alpaca_gpt4_zh", "med", "math")
    }
    info |= {
        "c4_demo": {"file_name": "notes.jsonl", "columns": {"prompt": "text"}},
        "dpo_en_demo": {
            "file_name": "pairs.json", "ranking": True, "formatting": "sharegpt",
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
        "kto_en_demo": {**chat, "file_name": "rated.json", "columns": {"messages": "messages", "kto_tag": "label"},
                        "tags": tags},
    }  # fmt: skip
    write_picture_rows(data)
    looked = {"type": "image_url", "value": "data/pictures/1.jpg"}  # V1 names files from where it is started
    text = [{"type": "text", "value": value} for value in ("What is it?", "A picture.")]
    v1_turns = [{"role": "user", "content": [looked, text[0]]}, {"role": "assistant", "content": text[1:]}]
    (data / "v1_multimodal_demo.jsonl").write_text((json.dumps({"messages": v1_turns}) + "\n") * 4)
    shown_rows = {"multimodal_demo": {"path": "data/v1_multimodal_demo.jsonl", "source": "local"}}
    (data / "v1_multimodal_demo.yaml").write_text(yaml.safe_dump(shown_rows))
    shown = {**chat, "file_name": "mllm.json", "columns": {"messages": "messages", "images": "images"}, "tags": tags}
    info |= dict.fromkeys(("mllm_demo", "llava_1k_en", "llava_1k_zh"), shown)
    info["rlhf_v"] = {**info["dpo_en_demo"], "columns": {**info["dpo_en_demo"]["columns"], "images": "images"}}
    info["rlhf_v"] |= {"file_name": "seen.json"}
    look = [{"from": "human", "value": "<image>What is it?"}]
    seen = [{**pair, "conversations": look, "images": ["pictures/1.jpg"]} for pair in pairs]
    for name, content in {"asked": rows, "seen": seen, "pairs": pairs, "rated": rated, "dataset_info": info}.items():
        (data / f"{name}.json").write_text(json.dumps(content))
    notes = "".join(json.dumps({"text": f"Note {n}: the sea is wide."}) + "\n" for n in rows)
    for name in ("notes", "c4_demo"):
        (data / f"{name}.jsonl").write_text(notes)
    preferred = [{"chosen": [*turns[:1], turns[1]], "rejected": [*turns[:1], {**turns[1], "content": "5"}]}] * 4
    (data / "preferred.json").write_text(json.dumps(preferred))
    v1 = {"path": "data/asked.json", "source": "local", "converter": "alpaca"}
    (data / "v1_sft_demo.yaml").write_text(yaml.safe_dump({"identity": v1}))
    v1_pairs = {**v1, "path": "data/preferred.json", "converter": "pair"}
    (data / "v1_dpo_demo.yaml").write_text(yaml.safe_dump({"pairs": v1_pairs}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny base with the tokens that Llama 3's template is made of, which the base of these examples has."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    add_tokens(Path(locate("lowrank/tiny")), folder, [], LLAMA3)
    return str(folder)


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base that sees, with the chat template of its family."""
    return str(save_vision_folder(tmp_path_factory.mktemp("bases") / "vision_folder", "qwen3_vl"))


def shows_pictures(path: str) -> bool:
    settings = SETTINGS[path]
    named = f"{settings.get('dataset')} {settings.get('train_dataset')}" if isinstance(settings, dict) else ""
    return any(name in named for name in ("mllm_demo", "llava_1k", "rlhf_v", "multimodal"))


def on_this_machine(path: str, base: str = "lowrank/tiny") -> Any:
    """Its settings, with a base that is here; a dataset that lies on the hub is taken from the folder."""
    settings = SETTINGS[path]
    if not isinstance(settings, dict):
        return settings
    changed = dict(settings)
    for key in ("model_name_or_path", "model"):
        if key in changed:
            changed[key] = base
    if str(changed.get("dataset_dir", "")).startswith("REMOTE:"):
        changed["dataset_dir"] = "data"
    return changed


def written(path: str, settings: Any) -> str:
    name = path.replace("/", "_")
    Path(name).write_text(json.dumps(settings) if name.endswith(".json") else yaml.safe_dump(settings))
    return name


def flags_of(lines: list[str]) -> list[str]:
    arguments = " ".join(lines).partition("train ")[2].replace("${MODEL_PATH}", "lowrank/tiny").split()
    return split_flags(arguments, known())[0]


def test_the_table_has_every_file() -> None:
    assert list(TABLE) == list(SETTINGS)


@pytest.mark.parametrize("path", TABLE)
def test_what_becomes_of_it(path: str, place: Path) -> None:
    state, why = TABLE[path]
    settings = on_this_machine(path)
    if isinstance(settings, list):
        if state == "train":
            arguments = flags_of(settings)
            assert load_any(arguments[0], arguments[1:])[0].jobs[0].adapter.type == "lora"
        return
    file = written(path, settings)
    if state == "none":
        with pytest.raises(ConfigError) as caught:
            load_any(file)
        assert "model" in str(caught.value)
    elif state == "refused":
        with pytest.raises(ConfigError) as caught:
            load_any(file)
        expected = next(texts for phrase, texts in REASONS.items() if phrase in why)
        assert any(text in str(caught.value) for text in expected)
    elif state == "train":
        assert translate(["train", file]).arguments in (None, ["train", file])
        load_any(file)
    else:
        arguments = translate([state, file]).arguments
        assert arguments is not None
        assert arguments[0] == state


def shortened(path: str, place: Path, base: str) -> Any:
    """One small step of it."""
    settings = on_this_machine(path, base)
    if "peft_config" in settings or "train_dataset" in settings:
        settings |= {
            "max_steps": 1, "cutoff_len": 400 if shows_pictures(path) else 64, "output_dir": "out", "bf16": False,
        }  # fmt: skip
        if "adapter_name_or_path" in settings.get("peft_config", {}):
            settings = {key: value for key, value in settings.items() if key in ("model", "peft_config")}
            settings["peft_config"] = {**settings["peft_config"], "adapter_name_or_path": adapter(place, base)}
        return settings
    if settings.get("do_train"):
        settings |= {"max_steps": 1, "max_samples": 4, "output_dir": "out", "per_device_train_batch_size": 1}
        settings |= {"gradient_accumulation_steps": 2, "cutoff_len": 400 if shows_pictures(path) else 64}
        if settings.get("oft_block_size") and shows_pictures(path):
            settings["oft_block_size"] = 8  # which divides the widths of that base
        if settings.get("tokenized_path"):
            settings["tokenized_path"] = "kept"
        if settings.get("use_llama_pro"):
            expand_model(ModelConfig(path=base), 2, place / "expanded")
            settings["model_name_or_path"] = str(place / "expanded")
    if settings.get("adapter_name_or_path"):
        settings["adapter_name_or_path"] = adapter(place, base)
    return settings | {"output_dir": "out", "max_new_tokens": 4}


def adapter(place: Path, base: str) -> str:
    """Trained by one step."""
    folder = place / "trained"
    if not folder.exists():
        arguments = [f"model={base}", "data.train=data/asked.json", "max_steps=1", f"output_dir={folder}"]
        with pytest.raises(SystemExit) as end:
            main(["train", *arguments, "--quiet"])
        assert end.value.code == 0
    return str(folder)


@pytest.mark.parametrize(
    "path",
    [
        path if path in QUICK else pytest.param(path, marks=pytest.mark.slow)
        for path in sorted(RUNNING, key=lambda path: path not in QUICK)
    ],
)
def test_it_runs(
    path: str, place: Path, base: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    state = TABLE[path][0]
    base = request.getfixturevalue("vision_folder") if shows_pictures(path) else base
    if path.endswith(".sh"):
        more = ["max_steps=1", "max_samples=4", "cutoff_len=64", "output_dir=out"]
        arguments = ["train", *flags_of(SETTINGS[path]), *more, "--quiet"]
    else:
        more = {"train": ["--quiet"], "chat": ["--prompt", "hi"], "export": ["--no-verify"], "predict": []}[state]
        arguments = [state, written(path, shortened(path, place, base)), *more]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0, capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_sees_is_trained_merged_and_asked_by_its_files(
    place: Path, vision_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The three of Qwen3-VL one after the other: the merged model has tower, processor and training's limits of pixels,
    is compared with a picture, and answers about one as base and adapter do."""

    def run(command: str, path: str, *more: str, **changes: Any) -> str:
        with pytest.raises(SystemExit) as end:
            main([command, written(path, shortened(path, place, vision_folder) | changes), *more])
        shown = capsys.readouterr()
        assert end.value.code == 0, shown.err
        return shown.out

    limits = {"image_max_pixels": 32 * 16, "image_min_pixels": 64}
    more = {"max_samples": 6, "max_steps": 3, "learning_rate": 0.05}
    run("train", "train_lora/qwen3vl_lora_sft.yaml", "--quiet", **limits, **more)
    run("export", "merge_lora/qwen3vl_lora_sft.yaml", adapter_name_or_path="out", export_dir="merged")
    report = json.loads(Path("merged/export.json").read_text("utf-8"))
    assert [each["name"] for each in report["comparisons"]] == ["merged", "merged, asked about a picture"]
    assert report["passed"]
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (vision_folder, "merged"))
    assert after.keys() == before.keys()
    towers = [name for name in before if "visual" in name]
    assert towers
    assert all(torch.equal(before[name], after[name]) for name in towers)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    images = transformers.AutoImageProcessor.from_pretrained("merged", backend="pil")
    assert images.size["longest_edge"] == 32 * 16
    question = ["--image", "data/pictures/1.jpg", "--prompt", "What is it?"]
    greedy = {"max_new_tokens": 8, "do_sample": False}
    plain = run("chat", "inference/qwen3vl.yaml", *question, **greedy)
    tuned = run("chat", "inference/qwen3vl.yaml", *question, **greedy, model_name_or_path="merged")
    adapted = run("chat", "inference/qwen3vl.yaml", *question, **greedy, adapter_name_or_path="out")
    assert tuned == adapted != plain

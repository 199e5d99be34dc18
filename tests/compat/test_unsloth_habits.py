"""What people do in notebooks: cells run twice, folders used again, adapters loaded, asked, thrown away, uploaded."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from datasets import Dataset

from lowrank.compat.unsloth import (
    FastLanguageModel,
    FastModel,
    SamplingParams,
    check_python_modules,
    create_locked_down_function,
    execute_with_time_limit,
)
from lowrank.compat.unsloth.saving import _move_into
from lowrank.errors import ConfigError, OutputError
from lowrank.models.loading.pretrained import TINY, locate
from tests.compat.test_unsloth import TARGETS, load, sft, tokenizer
from tests.hub_stand_in import hub_stand_in

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
ROW = torch.tensor([[5, 9, 11, 3, 8]])


def again(model: object, **settings: object) -> object:
    return FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, **{"target_modules": TARGETS, **settings})


def test_the_adapters_cell_run_twice(caplog: pytest.LogCaptureFixture) -> None:
    model = load()
    trained = {name: id(each) for name, each in model.named_parameters() if each.requires_grad}
    assert again(model) is model
    assert "has this adapter already" in caplog.text
    assert {name: id(each) for name, each in model.named_parameters() if each.requires_grad} == trained
    with pytest.raises(ConfigError, match=r"alpha: 8\.0 is there, 16\.0 is asked"):
        FastLanguageModel.get_peft_model(model, r=4, lora_alpha=16, target_modules=TARGETS)
    with pytest.raises(ConfigError, match="target_modules"):
        again(model, target_modules=["q_proj"])


def test_a_loaded_adapter_is_trained_on(tmp_path: Path) -> None:
    model = load()
    with torch.no_grad():
        for each in model.parameters():
            each += 0.01 if each.requires_grad else 0.0
    model.save_pretrained(tmp_path / "lora")
    loaded, _ = FastLanguageModel.from_pretrained(str(tmp_path / "lora"), 512, torch.float32, False)
    again(loaded)
    assert torch.equal(loaded.eval()(ROW).logits, model.eval()(ROW).logits)
    assert any(each.requires_grad for each in loaded.parameters())


def test_an_adapter_is_taken_out() -> None:
    model = load()
    bare = model.eval()(ROW).logits
    with torch.no_grad():
        for each in model.parameters():
            each += 0.01 if each.requires_grad else 0.0
    assert not torch.equal(model.eval()(ROW).logits, bare)
    model.delete_adapter("default")
    assert torch.equal(model.eval()(ROW).logits, bare)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    with pytest.raises(ConfigError, match="no adapter 'default'"):
        model.delete_adapter("default")
    again(model, target_modules=["q_proj"])
    assert {name.split(".")[-4] for name, _ in model.named_parameters() if "lora" in name} == {"q_proj"}


def test_what_a_tokenizer_gives_goes_whole_into_generate() -> None:
    model, own = load(), tokenizer()
    inputs = own(["add 2 and 3"], return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(input_ids=inputs, max_new_tokens=4, do_sample=False), plain)
    assert torch.equal(model.generate(inputs, max_new_tokens=4, do_sample=False), plain)
    model.train()
    assert torch.equal(model.generate(inputs, max_new_tokens=4, do_sample=False), plain)
    assert model.training, "as it was before"


def test_a_chat_is_token_ids_as_it_was() -> None:
    """Notebooks take its length for how long prompts get: of a dict that would be 2."""
    _, own = FastLanguageModel.from_pretrained(TINY, 64, torch.float32, False)
    chat = [{"role": "user", "content": "add 2 and 3"}]
    ids = own.apply_chat_template(chat, add_generation_prompt=True)
    assert isinstance(ids, list)
    assert len(ids) > 5
    assert own.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] == ids
    assert own.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt").tolist() == [ids]
    assert own.apply_chat_template(chat, tokenize=False).endswith("add 2 and 3<|im_end|>\n")
    other = copy.deepcopy(own)
    other.chat_template = "{{ messages[0].content }}"
    assert other.apply_chat_template(chat, tokenize=False) == "add 2 and 3"
    rows = Dataset.from_list([{"chat": chat}]).map(lambda row: {"ids": own.apply_chat_template(row["chat"])})
    assert rows[0]["ids"] == own.apply_chat_template(chat)


def test_answers_in_vllms_shape(tmp_path: Path) -> None:
    model, own = load(), tokenizer()
    with torch.no_grad():
        for name, each in model.named_parameters():
            each += 0.05 if each.requires_grad and "lora_B" in name else 0.0
    model.save_lora(tmp_path / "lora")
    prompts = ["add 2 and 3:", "add 100 and 200 and 3:"]
    greedy = SamplingParams(temperature=0, max_tokens=5)
    bare, tuned = (
        model.fast_generate(prompts, sampling_params=greedy, lora_request=request)
        for request in (None, model.load_lora(tmp_path / "lora"))
    )
    assert [each.prompt for each in bare] == prompts
    assert bare[0].outputs[0].text != tuned[0].outputs[0].text
    for answers, adapted in ((bare, False), (tuned, True)):
        for prompt, answer in zip(prompts, answers):
            with model.disable_adapter() if not adapted else torch.no_grad():
                alone = model.generate(own(prompt, return_tensors="pt"), max_new_tokens=5, do_sample=False)
            width = len(own(prompt)["input_ids"])
            assert answer.outputs[0].token_ids == alone[0, width:].tolist(), "padding changes no answer"
    model.fast_generate(prompts[0], greedy, model.load_lora(tmp_path / "lora"))
    assert model.active_adapter == "default"
    three = model.fast_generate(prompts[0], SamplingParams(n=3, seed=1, max_tokens=4, top_k=5))
    assert len(three[0].outputs) == 3
    stop = bare[0].outputs[0].text[1:3]
    cut = model.fast_generate(prompts[0], SamplingParams(temperature=0, max_tokens=5, stop=[stop]))
    assert cut[0].outputs[0].text == bare[0].outputs[0].text.partition(stop)[0]
    assert cut[0].outputs[0].finish_reason == "stop"
    with pytest.raises(ConfigError, match="presence_penalty"):
        model.fast_generate(prompts[0], SamplingParams(presence_penalty=1.0))


def test_all_weights(tmp_path: Path) -> None:
    model, own = FastModel.from_pretrained(TINY, 64, torch.float32, load_in_4bit=False, full_finetuning=True)
    assert all(each.requires_grad for each in model.parameters())
    assert FastModel.get_peft_model(model, r=4) is model
    trainer = sft(model, tmp_path / "run", max_steps=1)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    trainer.train()
    assert all(not torch.equal(each, before[name]) for name, each in model.named_parameters())
    with pytest.raises(ConfigError, match="there is no adapter"):
        model.save_pretrained_merged(tmp_path / "x", own, save_method="lora")
    assert FastModel.for_inference(model) is model
    assert own.padding_side == "left"


def test_parts_of_the_model() -> None:
    model, _ = FastModel.from_pretrained(TINY, 64, torch.float32, load_in_4bit=False)
    FastModel.get_peft_model(model, r=2, finetune_attention_modules=False)
    assert {name.split(".")[-4] for name, _ in model.named_parameters() if "lora" in name} == {
        "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_files_of_another_model_in_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, written = tmp_path / "model", tmp_path / "new"
    folder.mkdir()
    written.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt", "model-Q8_0.gguf",
                 "adapter_config.json", "adapter_model.safetensors"):  # fmt: skip
        (folder / name).write_text("old")
    (written / "model.safetensors").write_text("new")
    _move_into(written, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "model-Q8_0.gguf", "model.safetensors", "notes.txt",
    ]  # fmt: skip
    assert "holds an adapter too" in caplog.text


def test_the_base_is_not_written_over() -> None:
    with pytest.raises(OutputError, match="inside of the base"):
        load().save_pretrained_merged(Path(locate(TINY)) / "merged", tokenizer())


def test_uploads_reach_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_stand_in() as (kind, address):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        model = load(target_modules=["q_proj"])
        model.push_to_hub("me/lora", token="hf_secret")
        assert {"adapter_config.json", "adapter_model.safetensors"} <= kind.repositories["me/lora"].keys()
        assert kind.private["me/lora"]
        with pytest.raises(OutputError, match="refuses") as refused:
            model.push_to_hub("me/other", token="hf_wrong")
        assert "hf_wrong" not in str(refused.value)
        model.push_to_hub_merged("me/merged", tokenizer(), token="hf_secret", verify=False, private=False)
        assert "model.safetensors" in kind.repositories["me/merged"]
        assert not kind.private["me/merged"]
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        model.push_to_hub("me/lora", token="")


def test_functions_that_a_model_wrote() -> None:
    double = create_locked_down_function(
        "def f(x: int = 3, *, by=2) -> int:\n    import math\n    return math.floor(x) * by"
    )
    assert (double(), double(5, by=3)) == (6, 15)
    for text in ("import os", "def f():\n    return ().__class__", "@x\ndef f(): pass", "def f(a=open('x')): pass"):
        with pytest.raises(ConfigError):
            create_locked_down_function(text)
    with pytest.raises(NameError):
        create_locked_down_function("def f():\n    return open('x')")()
    with pytest.raises(ImportError, match="subprocess"):
        create_locked_down_function("def f():\n    import subprocess")()
    assert check_python_modules("import math, numpy.linalg\nfrom . import x") == (
        False, {"stdlib": ["math"], "non_stdlib": ["numpy"], "relative_imports": 1},
    )  # fmt: skip
    assert check_python_modules("def f(): import re")[0]
    assert "error" in check_python_modules("def f(:")[1]


def test_a_time_limit() -> None:
    @execute_with_time_limit(0.2)
    def forever() -> None:
        while True:
            pass

    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"more than 0\.2 s"):
        forever()
    assert time.monotonic() - started < 5
    assert execute_with_time_limit(5)(lambda x: x + 1)(1) == 2

"""Unsloth's vision notebooks on a tiny base that sees: their shape with the import changed, against PEFT and TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import TextStreamer
from trl import SFTConfig, SFTTrainer

from lowrank.compat.unsloth import FastVisionModel, UnslothVisionDataCollator
from lowrank.compat.unsloth import trainer as unsloth_trainer
from lowrank.errors import ConfigError, DataError
from lowrank.models.layers import Parts
from lowrank.models.loading.quiet import quiet_transformers
from tests.tiny_vision_models import save_vision_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
INSTRUCTION = "Write the formula in this image."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_vision_folder(tmp_path_factory.mktemp("bases") / "sighted", "qwen3_vl"))


def drawn(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    value = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(value)


def samples(number: int = 4) -> list[dict[str, Any]]:
    return [{"image": drawn(seed), "text": f"x = {seed}"} for seed in range(number)]


def conversation(sample: dict[str, Any]) -> dict[str, Any]:
    question = [{"type": "text", "text": INSTRUCTION}, {"type": "image", "image": sample["image"]}]
    answer = [{"type": "text", "text": sample["text"]}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def loaded(base: str, **settings: Any) -> tuple[Any, Any]:
    model, tokenizer = FastVisionModel.from_pretrained(
        base, load_in_4bit=False, use_gradient_checkpointing="unsloth", dtype=torch.float32
    )
    model = FastVisionModel.get_peft_model(
        model,
        **{
            "finetune_vision_layers": True, "finetune_language_layers": True, "finetune_attention_modules": True,
            "finetune_mlp_modules": True, "r": 4, "lora_alpha": 4, "lora_dropout": 0, "bias": "none",
            "random_state": 3407, "use_rslora": False, "loftq_config": None, **settings,
        },
    )  # fmt: skip
    return model, tokenizer


def answered(model: Any, tokenizer: Any) -> Any:
    """As the notebooks ask."""
    if not isinstance(model, peft.PeftModel) or hasattr(model, "bank"):
        FastVisionModel.for_inference(model)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    inputs = tokenizer(drawn(2), text, add_special_tokens=False, return_tensors="pt").to(model.device)
    return model.generate(**inputs, max_new_tokens=6, use_cache=True, do_sample=False)


def test_the_shape_of_the_notebooks(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = loaded(base)
    converted = [conversation(sample) for sample in samples()]
    before = answered(model, tokenizer)
    FastVisionModel.for_training(model)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,  # type: ignore[call-arg]
        data_collator=unsloth_trainer.UnslothVisionDataCollator(model, tokenizer),
        train_dataset=converted,  # type: ignore[arg-type]
        args=SFTConfig(
            per_device_train_batch_size=2, gradient_accumulation_steps=2, warmup_steps=1, max_steps=4,
            learning_rate=5e-2, logging_steps=1, optim="adamw_8bit", weight_decay=0.001, lr_scheduler_type="linear",
            seed=3407, output_dir=str(tmp_path / "outputs"), report_to="none", remove_unused_columns=False,
            dataset_text_field="", dataset_kwargs={"skip_prepare_dataset": True}, max_length=2048, use_cpu=True,
        ),
    )  # fmt: skip
    stats = trainer.train()
    assert stats.metrics["train_runtime"] > 0
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    after = answered(model, tokenizer)
    assert after.tolist() != before.tolist()
    inputs = tokenizer(drawn(2), tokenizer.image_token + "?", return_tensors="pt")
    model.generate(
        **inputs, streamer=TextStreamer(tokenizer, skip_prompt=True), max_new_tokens=4, temperature=1.5, min_p=0.1
    )
    capsys.readouterr()

    model.save_pretrained(str(tmp_path / "lora"))
    tokenizer.save_pretrained(str(tmp_path / "lora"))
    again, its = FastVisionModel.from_pretrained(
        model_name=str(tmp_path / "lora"), load_in_4bit=False, dtype=torch.float32
    )
    assert answered(again, its).tolist() == after.tolist()
    with quiet_transformers():
        theirs = transformers.AutoModelForMultimodalLM.from_pretrained(base)
    twin: Any = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "lora"))
    assert answered(twin.eval(), its).tolist() == after.tolist()

    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    whole = twin.merge_and_unload().state_dict()
    changed = [name for name in merged if "visual" in name and "blocks" in name]
    assert changed
    for name in changed:
        torch.testing.assert_close(merged[name].float(), whole[name], rtol=0, atol=2e-2)
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file() or (
        tmp_path / "merged" / "processor_config.json"
    ).is_file()


def test_loss_and_gradients_are_those_of_peft(base: str) -> None:
    model, tokenizer = loaded(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    FastVisionModel.for_training(model)
    batch = UnslothVisionDataCollator(model, tokenizer)([conversation(sample) for sample in samples(2)])
    ours = model(**batch).loss
    ours.backward()
    with quiet_transformers():
        theirs = transformers.AutoModelForMultimodalLM.from_pretrained(base)
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    targets = sorted({name.partition("model.model.")[2].partition(".lora_")[0] for name in own})
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules="|".join(targets).replace(".", r"\."))
    twin = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in own:
                parameter.copy_(own[name])
    loss = twin(**batch).loss
    loss.backward()
    assert ours.item() == pytest.approx(loss.item(), abs=1e-5)
    compared = 0
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(own[name].grad, parameter.grad, rtol=0, atol=1e-5)
            compared += "visual" in name
    assert compared == 16


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, {"language_model", "vision_tower"}),
        ({"finetune_vision_layers": False}, {"language_model"}),
        ({"finetune_language_layers": False}, {"vision_tower"}),
        ({"finetune_mlp_modules": False}, {"language_model", "vision_tower"}),
        ({"target_modules": "all-linear"}, {"language_model", "vision_tower"}),
    ],
)
def test_what_is_finetuned(base: str, settings: dict[str, Any], parts: set[str]) -> None:
    model, _ = loaded(base, **settings)
    names = list(model.bank.slots[0].ranks)
    assert {Parts(model.base.model).of(name) for name in names} == parts
    assert any("mlp" in name for name in names) == ("finetune_mlp_modules" not in settings)


def test_labels(base: str) -> None:
    model, tokenizer = loaded(base)
    rows = [conversation(sample) for sample in samples(2)]
    batch = UnslothVisionDataCollator(model, tokenizer)(rows)
    shown = batch["input_ids"] == tokenizer.image_token_id
    assert shown.any()
    assert (batch["labels"][shown] == -100).all()
    assert (batch["labels"][~shown & (batch["attention_mask"] == 1)] != -100).all()
    answers = UnslothVisionDataCollator(
        model, tokenizer, train_on_responses_only=True, instruction_part="<|im_start|>user\n",
        response_part="<|im_start|>assistant\n",
    )(rows)  # fmt: skip
    learned = [tokenizer.decode(row[row != -100]) for row in answers["labels"]]
    assert [text.split("<|im_end|>")[0] for text in learned] == ["x = 0", "x = 1"]
    split = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows]
    completions = UnslothVisionDataCollator(model, tokenizer)(split)
    assert [tokenizer.decode(row[row != -100]).startswith("x = ") for row in completions["labels"]] == [True, True]


def test_pictures_are_made_smaller_as_asked_and_never_cut(base: str) -> None:
    model, tokenizer = loaded(base)
    row = conversation({"image": drawn(0, (1024, 512)), "text": "x"})
    assert UnslothVisionDataCollator(model, tokenizer)._size(1024, 512) == (512, 256)
    assert UnslothVisionDataCollator(model, tokenizer, resize=256, resize_dimension=1)._size(1024, 512) == (512, 256)
    assert UnslothVisionDataCollator(model, tokenizer, resize="max")._size(1024, 512) == (1024, 512)
    with pytest.raises(DataError, match="max_seq_length=20 would cut a picture"):
        UnslothVisionDataCollator(model, tokenizer, max_seq_length=20)(
            [
                {
                    "messages": [
                        {
                            "role": "user",
                            "content": [{"type": "text", "text": "Long " * 9}, row["messages"][0]["content"][1]],
                        }
                    ]
                }
            ]
        )
    whole = UnslothVisionDataCollator(model, tokenizer)([row])["input_ids"].shape[1]
    assert UnslothVisionDataCollator(model, tokenizer, max_seq_length=whole - 4)([row])["labels"].shape[1] == whole - 4
    with pytest.raises(ConfigError, match="snap_to_patch_size"):
        UnslothVisionDataCollator(model, tokenizer, snap_to_patch_size=True)
    with pytest.raises(DataError, match="a picture behind a URL"):
        UnslothVisionDataCollator(model, tokenizer)([conversation({"image": "https://example.org/a.png", "text": "x"})])
    with pytest.raises(ConfigError, match="has no tower for pictures"):
        FastVisionModel.from_pretrained("lowrank/tiny", load_in_4bit=False)


def test_a_prefix_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reads prompts both ways, and trainers do not tell it where they end"):
        FastVisionModel.from_pretrained(str(save_vision_folder(tmp_path / "m", "paligemma")), load_in_4bit=False)

"""A family that comes with its own code: loaded, trained, exported and asked, where a person has allowed that."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from lowrank.config import validate_settings
from lowrank.errors import LowrankError, ModelError
from lowrank.generate.sampler import GenerationConfig
from lowrank.pipelines.inference import open_inference_model
from lowrank.pipelines.train import train
from lowrank.records import Conversation, Message
from lowrank.third_party import code_allowed
from tests.checkpoint_folder import write_alpaca
from tests.command_line import lowrank
from tests.remote_code_model import save_remote_code_folder, save_sequence_first_folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and a run on it."""
    folder = tmp_path_factory.mktemp("world")
    save_remote_code_folder(folder / "model")
    write_alpaca(folder / "train.json", 16)
    with code_allowed():
        train(validate_settings(settings(folder, folder / "run")), allow_code=True)
    return folder


def settings(world: Path, out: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(world / "model"), "dtype": "float32", "trust_remote_code": True},
        "data": {"train": str(world / "train.json"), "batch_size": 8}, "adapter": {"rank": 4, "type": "dora"},
        "optimizer": {"learning_rate": 1e-2}, "max_steps": 12, "output_dir": str(out), "save_steps": None,
        "ignore_memory_plan": True,
    }  # fmt: skip


def test_it_learns(world: Path) -> None:
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert summary["jobs"]["default"]["last_loss"] < math.log(259) - 0.15  # of a random frozen base


def test_without_the_permission_nothing_of_it_runs(world: Path, tmp_path: Path) -> None:
    with pytest.raises(LowrankError, match="--allow-code"):
        train(validate_settings(settings(world, tmp_path / "run")))
    with pytest.raises(LowrankError, match="--allow-code"):
        open_inference_model(str(world / "run"), notify=lambda _: None)


def test_chat(world: Path) -> None:
    trained = open_inference_model(str(world / "run"), notify=lambda _: None, allow_code=True)
    question = Conversation((Message("user", "Say 3"),))
    answers = trained.answer(
        [("default", question), ("base", question)], GenerationConfig(max_new_tokens=6, temperature=0)
    )
    assert len(answers) == 2
    assert all(isinstance(answer, str) for answer in answers)


def test_the_export_is_what_was_trained(world: Path, tmp_path: Path) -> None:
    done = lowrank("export", str(world / "run"), "--to", "merged", "-o", str(tmp_path / "m"), "--allow-code")
    assert done.returncode == 0, done.stdout + done.stderr
    written = next((tmp_path / "m").rglob("config.json")).parent
    token = torch.tensor([[5, 9, 11, 3, 77]])
    load = transformers.AutoModelForCausalLM.from_pretrained
    merged = load(written, trust_remote_code=True).eval()
    tuned = PeftModel.from_pretrained(
        load(world / "model", trust_remote_code=True), str(world / "run" / "default" / "last")
    ).eval()
    torch.testing.assert_close(merged(token).logits, tuned(token).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("named_head", "reason"),
    [(False, "has no language-model head that its own code names"), (True, r"come as \(\d+, 1, 32\), not as")],
)
def test_a_family_like_the_first_chatglm_is_refused_with_the_reason(
    named_head: bool, reason: str, tmp_path: Path
) -> None:
    """Its hidden states are (tokens, documents, width); nothing is trained or answered wrongly on them."""
    folder = tmp_path / f"glm_{named_head}"  # transformers keeps the code of folders of one name apart by that alone
    save_sequence_first_folder(folder, named_head=named_head)
    write_alpaca(tmp_path / "train.json", 4)
    own = {"path": str(folder), "dtype": "float32", "trust_remote_code": True}
    with pytest.raises(ModelError, match=reason):
        open_inference_model(str(folder), notify=lambda _: None, allow_code=True)
    with code_allowed(), pytest.raises(ModelError, match=reason):
        train(validate_settings({**settings(tmp_path, tmp_path / "run"), "model": own}), allow_code=True)
    assert not (tmp_path / "run" / "default").exists()

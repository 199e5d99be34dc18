"""The pages `docs/add-a-*.md`: their examples run as they stand there, and what they name is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from lowrank import objectives, settings
from lowrank.adapters.bank import Bank
from lowrank.adapters.gradient_check import TOLERANCE, gradient_errors
from lowrank.adapters.variants import AdapterConfig
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.models.config import named_model
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.models.storages import StorageConfig
from lowrank.objectives.sft import SFTConfig
from lowrank.records import Conversation, Message
from lowrank.third_party import code_allowed
from lowrank.train.engine import Engine
from lowrank.train.optimizers import OptimizerConfig
from tests.tiny_models import make_base, random_step

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("add-a*.md"))


def example(page: str, language: str = "python") -> str:
    (code,) = re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)
    return code


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write the example of a page as the file that it says it is."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(settings, "_LOADED", {})

    def write(page: str) -> str:
        code = example(page)
        (name,) = re.findall(r"^# (\w+)\.py", code)
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def test_a_storage(module: Any) -> None:
    name = module("add-a-storage.md")
    with code_allowed():
        config = TypeAdapter(StorageConfig).validate_python({"type": f"{name}:Sign"})
    dtype = torch.float64
    layer, other = (config.wrap(torch.nn.Linear(columns, rows).to(dtype)) for rows, columns in ((48, 64), (31, 50)))
    errors = gradient_errors(layer, other, dtype, torch.device("cpu"))
    assert {what: error for what, error in errors.items() if not error < TOLERANCE[dtype]} == {}
    kept = sum(each.numel() * each.element_size() for key, each in layer.named_buffers() if key != "bias")
    assert kept == config.bytes_of((48, 64))


def test_an_optimizer(module: Any) -> None:
    name = module("add-an-optimizer.md")
    with code_allowed():
        config = TypeAdapter(OptimizerConfig).validate_python({"type": f"{name}:SignSGD", "learning_rate": 0.01})
    bank = Bank(make_base("llama"))
    engine, slot = (
        Engine(bank.base, bank, 4096),
        bank.add(TypeAdapter(AdapterConfig).validate_python({"rank": 4}), seed=0),
    )
    engine.add(slot, SFTConfig().build(), config, seed=0, neftune_alpha=0.0)
    work = {slot: random_step(0, [12, 20])}
    losses, before = [], []
    for _ in range(4):
        losses.append(engine.forward_backward(work)[slot].loss)
        before = [each.detach().clone() for each in engine.bank.parameters(slot).values()]
        engine.optim_step(slot, 0.01)
    assert losses[-1] < losses[0]
    moved = [(now - then).abs() for now, then in zip(engine.bank.parameters(slot).values(), before)]
    assert all(bool(((each - 0.01).abs().lt(1e-6) | each.eq(0)).all()) for each in moved)


def test_an_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A built-in file of its folder: with gamma 0 it is SFT's loss."""
    monkeypatch.setattr(objectives, "__path__", [str(tmp_path)])
    (tmp_path / "focal.py").write_text(example("add-an-objective.md"))
    monkeypatch.delitem(sys.modules, f"{objectives.__name__}.focal", raising=False)
    config = settings.configs_in(objectives.__name__)["focal"]
    optimizer = TypeAdapter(OptimizerConfig).validate_python({})
    steps = []
    for objective in (SFTConfig(), config(gamma=0.0), config()):
        bank = Bank(make_base("llama"))
        slot = bank.add(LoraConfig(rank=4), seed=0)
        engine = Engine(bank.base, bank, 4096)
        engine.add(slot, objective.build(), optimizer, seed=0, neftune_alpha=0.0)
        steps.append(engine.forward_backward({slot: random_step(0, [12, 20])})[slot].loss)
    assert steps[1] == pytest.approx(steps[0], rel=1e-6)
    assert steps[2] < steps[0] * 0.999


def test_a_template(tmp_path: Path) -> None:
    (tmp_path / "my.jinja").write_text(example("add-a-template.md", "jinja"))
    tokenizer = load_tokenizer(named_model("lowrank/tiny"))
    renderer = Renderer(tokenizer, DataConfig(chat_template=str(tmp_path / "my.jinja")))
    (segment,) = renderer.render(Conversation((Message("user", "Say hi"), Message("assistant", "hi")))).segments
    learned = [token for token, weight in zip(segment.token_L.tolist(), segment.weight_L) if weight]
    assert tokenizer.decode(segment.token_L) == f"Q: Say hi\nA: hi{tokenizer.eos_token}"  # nothing after the end
    assert renderer.notices == ()
    assert tokenizer.decode(learned).strip() == f"hi{tokenizer.eos_token}"  # the space before it is of its first token


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """By their whole path; and the index of the pages names the page."""
    named = re.findall(r"`((?:lowrank|tests|examples|docs)/[\w./-]+?)/?`", page.read_text("utf-8"))
    assert [name for name in named if not (DOCS.parent / name).exists()] == []
    assert f"({page.name})" in (DOCS / "README.md").read_text("utf-8")


def test_the_index_has_every_page() -> None:
    text = (DOCS / "README.md").read_text("utf-8")
    assert [page.name for page in sorted(DOCS.glob("*.md")) if page.name != "README.md" and page.name not in text] == []

"""Answers through compiled layers are the plain ones, nothing is compiled twice for nothing, and what is wrong is not
used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowrank.adapters.variants.dora import DoraConfig
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.adapters.variants.pfeiffer import PfeifferConfig
from lowrank.generate.compiled_decoding import CompiledDecoding
from lowrank.generate.generator import Generator, GeneratorConfig
from lowrank.generate.request import GenerationConfig, Prompt
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load
from lowrank.train.engine import Engine
from tests.generate.test_generator import text
from tests.tiny_models import FAMILIES, make_base, make_engine

LONG = GenerationConfig(max_new_tokens=20)


class Counting:
    """A compiler that changes nothing, and counts."""

    def __init__(self, then: Callable[[Any], Any] = lambda run: run) -> None:
        self.graphs = 0
        self.seen: list[Any] = []
        self.then = then

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        self.seen.append(graph)
        return self.then(graph.forward)


def world(*configs: Any, family: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any) -> Engine:
    engine, slots = make_engine(make_base(family, dtype, **changes), *configs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for slot in slots:
            for parameter in engine.bank.parameters(slot).values():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
            engine.bank.refresh(slot)
    return engine


def compiled(engine: Engine, backend: Any, notes: list[str] | None = None) -> Generator:
    generator = Generator(engine.base, engine.bank, GeneratorConfig())
    notify = (notes if notes is not None else []).append
    generator.compiled = CompiledDecoding(engine.base, engine.bank, notify, backend)
    return generator


def answers(generator: Generator, slots: list[int]) -> list[list[int]]:
    running = [generator.submit(Prompt(text(i, 5 + 4 * i), slot), LONG) for i, slot in enumerate(slots)]
    return [each.result().tokens for each in running]


def plain(engine: Engine, slots: list[int]) -> list[list[int]]:
    return answers(Generator(engine.base, engine.bank), slots)


LEFT_PLAIN: tuple[str, ...] = ()
"""Families whose layers are no single graph."""
LORAS = LoraConfig(rank=4), LoraConfig(rank=2, target_modules=("q_proj", "down_proj")), LoraConfig(rank=3, alpha=1)


def test_equal_and_compiled_once() -> None:
    """Longer sequences, other adapters and changed weights compile nothing anew, and neither does another layer."""
    engine, backend, notes = world(*LORAS), Counting(), []
    generator = compiled(engine, backend, notes)
    assert answers(generator, [0, 1, 2, -1, 0]) == plain(engine, [0, 1, 2, -1, 0])
    seen = backend.graphs
    assert 1 <= seen <= 2, "one row is not many"
    with torch.no_grad():
        for parameter in engine.bank.parameters(1).values():
            parameter.mul_(-2)
    engine.bank.refresh(1)
    generator.changed(1)
    for slots in ([2, 1, 0], [1, 1, -1, 0, 2, 2, 2]):
        assert answers(generator, slots) == plain(engine, slots)
    assert backend.graphs <= seen + 1
    assert generator.compiled is not None
    assert generator.compiled.problem is None
    assert not notes
    assert all(each._compiled_call_impl is None for each in engine.base.model.modules())


def test_an_adapter_of_more_layers_in_a_slot_that_was_freed() -> None:
    """Layers that it has wrapped anew got no update, and no step of so many rows and slots was compared again."""
    engine, notes = world(LoraConfig(rank=4, target_modules=("q_proj",))), []
    generator = compiled(engine, Counting(), notes)
    assert answers(generator, [0, 0]) == plain(engine, [0, 0])
    engine.remove(0)
    engine.bank.remove(0)
    assert engine.bank.add(LoraConfig(rank=4), seed=1) == 0
    with torch.no_grad():
        for parameter in engine.bank.parameters(0).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(parameter))
    engine.bank.refresh(0)
    assert answers(generator, [0, 0]) == plain(engine, [0, 0])
    assert not notes


def test_a_first_question_of_one_token() -> None:
    engine, notes = world(*LORAS), []
    generator = compiled(engine, Counting(), notes)
    prompt = Prompt(text(0, 1), 0)
    assert (
        generator.submit(prompt, LONG).result().tokens
        == Generator(engine.base, engine.bank).submit(prompt, LONG).result().tokens
    )
    assert generator.compiled is not None
    assert generator.compiled.problem is None
    assert not notes


def test_one_row_alone() -> None:
    engine, notes = world(*LORAS), []
    backend = Counting()
    assert answers(compiled(engine, backend, notes), [0]) == plain(engine, [0])
    assert backend.graphs == 1
    assert not notes


def test_what_gives_other_values_is_not_used() -> None:
    def off(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *inputs: tuple(each * 1.01 for each in run(*inputs))

    engine, notes = world(*LORAS), []
    assert answers(compiled(engine, Counting(off), notes), [0, 1, -1]) == plain(engine, [0, 1, -1])
    (note,) = notes
    assert "gives other values" in note


def test_what_does_not_compile_is_plain() -> None:
    def refuse(run: Any) -> Any:
        raise RuntimeError("no compiler here")

    engine, notes = world(*LORAS), []
    assert answers(compiled(engine, Counting(refuse), notes), [0, 1]) == plain(engine, [0, 1])
    (note,) = notes
    assert "no compiler here" in note


@pytest.mark.parametrize("config", [PfeifferConfig(), DoraConfig(rank=2)])
def test_other_adapters_are_answered_plainly(config: Any) -> None:
    engine, notes = world(LORAS[0], config), []
    assert answers(compiled(engine, Counting(), notes), [0, 1]) == plain(engine, [0, 1])
    assert len(notes) == 1


def test_no_slots_values_meet() -> None:
    engine = world(*LORAS)
    before = plain(engine, [0, 2])
    with torch.no_grad():
        for parameter in engine.bank.parameters(1).values():
            parameter.fill_(float("nan"))
    engine.bank.refresh(1)
    generator = compiled(engine, Counting())
    running = [generator.submit(Prompt(text(i, 5 + 4 * i), slot), LONG) for i, slot in [(0, 0), (3, 1), (1, 2)]]
    tokens = [each.result().tokens for each in running]
    assert [tokens[0], tokens[2]] == before
    assert generator.compiled is not None
    assert generator.compiled.problem is None


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_inductor(family: str) -> None:
    """Compiled, or told why not; the same answers."""
    engine, notes = world(LORAS[0], LORAS[2], family=family, dtype=torch.float32), []
    generator = compiled(engine, "inductor", notes)
    if generator.notice is not None:
        pytest.skip(generator.notice)
    assert answers(generator, [0, 1, -1]) == plain(engine, [0, 1, -1])
    assert bool(notes) == (family in LEFT_PLAIN), notes


STORAGES = ("nf4", {"type": "nf4", "double_quant": False}, "fp4", "int8", "eetq", {"type": "hqq", "bits": 3}, "bf16")


def packed_world(storage: Any) -> Engine:
    settings = {"path": "lowrank/tiny", "dtype": "float32", "device": "cpu", "storage": storage}
    base = load(ModelConfig.model_validate(settings), tokenizer=None, notify=lambda text: None)
    return make_engine(base, LoraConfig(rank=4))[0]


@pytest.mark.parametrize(
    "storage", [pytest.param(each, marks=() if each == "nf4" else pytest.mark.slow) for each in STORAGES], ids=str
)
def test_packed_layers_are_operators(storage: Any) -> None:
    """Of one graph for all layers, whose scales and offsets are tensors."""
    engine, backend, notes = packed_world(storage), Counting(), []
    assert answers(compiled(engine, backend, notes), [0, -1]) == plain(engine, [0, -1])
    assert not notes
    assert 1 <= backend.graphs <= 2, "one row is not many"
    calls = [
        node.target
        for graph in backend.seen
        for node in graph.graph.nodes
        if node.op == "call_function" and node.target == torch.ops.lowrank.packed_product
    ]
    assert len(calls) == 7 * backend.graphs


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_packed_storages_with_inductor(storage: Any) -> None:
    engine, notes = packed_world(storage), []
    assert answers(compiled(engine, "inductor", notes), [0, -1]) == plain(engine, [0, -1])
    assert not notes

"""Every optimizer against the library or paper it comes from, and the promises all of them keep."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from lowrank.checkpoints.optimizer_state import flatten_optimizer, restore_optimizer
from lowrank.errors import ConfigError
from lowrank.planning.live_bytes import LiveBytes
from lowrank.settings import configs_in
from lowrank.train.optimizers import ABSENT, OptimizerConfig, OptimizerSettings, bytes_of_state, set_learning_rate

OPTIMIZERS = configs_in("lowrank.train.optimizers")
OWN: dict[str, dict[str, Any]] = {
    "galore": {"rank": 4, "update_interval": 7, "scale": 0.5},
    "galore_8bit": {"rank": 48, "update_interval": 7, "scale": 0.5},
    "badam": {"switch_interval": 1, "include_lm_head": True},
    "apollo": {"rank": 4, "update_interval": 100, "scale": 3.0},
    "sgd": {"momentum": 0.9},
}
SHAPES = {
    "layers.0.up.weight": (96, 64),
    "layers.1.down.weight": (64, 96),
    "model.norm.weight": (64,),
    "head.bias": (5,),
}
RATE = 1e-2


def fresh() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def build(name: str, parameters: Mapping[str, nn.Parameter], decay: float = 0.1) -> torch.optim.Optimizer:
    config: Any = OPTIMIZERS[name](learning_rate=RATE, weight_decay=decay, **OWN.get(name, {}))
    return config.build(parameters, None, ("model.norm.weight", "head.bias"))


def take_steps(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], first: int, end: int) -> None:
    for step in range(first, end):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * (1.0 + 0.3 * step)
        set_learning_rate(optimizer, RATE)
        optimizer.step()


def groups(parameters: Mapping[str, nn.Parameter], **of_matrices: Any) -> list[dict[str, Any]]:
    """As libraries want them: matrices with weight decay, the rest without."""
    matrices = [value for value in parameters.values() if value.ndim == 2]
    rest = [value for value in parameters.values() if value.ndim == 1]
    return [{"params": matrices, "weight_decay": 0.1, **of_matrices}, {"params": rest, "weight_decay": 0.0}]


def theirs(name: str, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(groups(parameters), lr=RATE)
    if name == "sgd":
        return torch.optim.SGD(groups(parameters), lr=RATE, momentum=0.9)
    if name in ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion"):
        bnb: Any = pytest.importorskip("bitsandbytes").optim
        kind, more = {
            "paged_adamw_32bit": (bnb.AdamW32bit, {}),
            "lion": (bnb.Lion32bit, {"betas": (0.9, 0.99)}),
        }.get(name, (bnb.AdamW8bit, {}))
        return kind(groups(parameters), lr=RATE, **more)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups(parameters), lr=RATE, scale_parameter=False, relative_step=False)
    if name == "schedule_free":
        optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(groups(parameters), lr=RATE)
        optimizer.train()
        return optimizer
    if name == "adam_mini":
        kind = pytest.importorskip("adam_mini").Adam_mini
        named = [(key.replace("layers", "mlp"), value) for key, value in parameters.items()]
        return kind(named, lr=RATE, weight_decay=0.1, verbose=False)
    settings = {"rank": 4, "proj_type": "std"}
    if name == "galore_8bit":
        settings |= {"rank": 48, "update_proj_gap": 7, "scale": 0.5}
        return pytest.importorskip("galore_torch").GaLoreAdamW8bit(groups(parameters, **settings), lr=RATE)
    if name == "galore":
        settings |= {"update_proj_gap": 7, "scale": 0.5}
        optimizer = pytest.importorskip("galore_torch").GaLoreAdamW
        return optimizer(groups(parameters, **settings), lr=RATE, eps=1e-8, no_deprecation_warning=True)
    assert name == "apollo", f"no peer for {name}"
    settings |= {"update_proj_gap": 100, "scale": 3.0, "proj": "random", "scale_type": "channel"}
    optimizer = pytest.importorskip("apollo_torch").APOLLOAdamW
    return optimizer(groups(parameters, **settings), lr=RATE, eps=1e-8)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"muon", "badam"}))
def test_twenty_steps_are_the_librarys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "galore_8bit":
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # the library waits for a GPU, there or not
    ours, others = fresh(), fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        peer = theirs(name, others)
    take_steps(build(name, ours), ours, 0, 20)
    take_steps(peer, others, 0, 20)
    start = fresh()
    for key, parameter in ours.items():
        moved = (others[key] - start[key]).detach().abs().max()
        assert moved > 1e-3
        torch.testing.assert_close(parameter, others[key], rtol=0, atol=float(1e-4 * moved), msg=f"{name} {key}")


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest() -> None:
    ours, others = fresh(), fresh()
    take_steps(build("muon", ours), ours, 0, 20)
    matrices = {name: value for name, value in others.items() if value.ndim == 2}
    rest = {name: value for name, value in others.items() if value.ndim == 1}
    muon = torch.optim.Muon(matrices.values(), lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest.values(), lr=RATE, weight_decay=0.0)
    for step in range(20):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in others.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * (1.0 + 0.3 * step)
        muon.step()
        adamw.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, others[name], rtol=1e-5, atol=1e-6, msg=name)
    table = {"model.embed_tokens.weight": nn.Parameter(torch.zeros(9, 4))}
    assert [type(part) for part in OPTIMIZERS["muon"]().build(table).parts] == [torch.optim.AdamW]  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["descending", "ascending", "random", "fixed"])
def test_badam_is_adamw_on_one_block_after_another(mode: str) -> None:
    """Algorithm 1 of the paper, written out: fresh moments with each block, the others left alone."""
    ours, others = fresh(), fresh()
    config: Any = OPTIMIZERS["badam"](
        learning_rate=RATE, weight_decay=0.1, switch_interval=7, switch_mode=mode, include_lm_head=True
    )
    optimizer = config.build(ours, None, ("model.norm.weight", "head.bias"))
    blocks = [["layers.0.up.weight"], ["layers.1.down.weight"], ["model.norm.weight", "head.bias"]]
    order = {"descending": [2, 1, 0, 2], "ascending": [0, 1, 2, 0], "fixed": [2] * 4, "random": None}[mode]
    trained: list[set[str]] = []
    optimizer.set_block_callback(lambda names: trained.append(set(names)))
    take_steps(optimizer, ours, 0, 22)
    if order is None:
        order = [next(i for i, block in enumerate(blocks) if set(block) == names) for names in trained]
        assert sorted(order[:3]) == [0, 1, 2]
    assert trained == [set(blocks[index]) for index in order]
    for turn, index in enumerate(order):
        own = {name: others[name] for name in blocks[index]}
        plain = torch.optim.AdamW(groups(own), lr=RATE)
        for step in range(7 * turn, min(7 * turn + 7, 22)):
            generator = torch.Generator().manual_seed(100 + step)
            for parameter in others.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator) * (1.0 + 0.3 * step)
            plain.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, others[name], rtol=1e-6, atol=1e-6, msg=name)
        assert torch.equal(parameter, fresh()[name]) == (mode == "fixed" and "layers" in name)


def test_adam_mini_shares_a_moment_within_a_head() -> None:
    """Queries and keys by heads, as in the library; every other matrix by rows, which there only known names are."""
    kind = pytest.importorskip("adam_mini").Adam_mini
    shapes = {"layers.0.self_attn.q_proj.weight": (32, 32), "layers.0.self_attn.k_proj.weight": (16, 32)}
    generator = torch.Generator().manual_seed(0)
    ours = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    others = {name: nn.Parameter(value.detach().clone()) for name, value in ours.items()}
    config: Any = OPTIMIZERS["adam_mini"](learning_rate=RATE)
    optimizer = config.build(ours, None, (), head_dim=8)
    take_steps(optimizer, ours, 0, 20)
    take_steps(kind(others.items(), lr=RATE, dim=32, n_heads=4, n_kv_heads=2, verbose=False), others, 0, 20)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, others[name], rtol=1e-6, atol=1e-7, msg=name)
    moments = [tuple(optimizer.state[each]["exp_avg_sq"].shape) for each in ours.values()]
    assert moments == [(4, 1), (2, 1)]


@pytest.mark.parametrize("stopped_at", [0, 4, 9])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_resumed_equals_uninterrupted_to_the_bit(name: str, stopped_at: int) -> None:
    whole = fresh()
    take_steps(build(name, whole), whole, 0, 12)
    first = fresh()
    optimizer = build(name, first)
    take_steps(optimizer, first, 0, stopped_at)
    second = {key: nn.Parameter(value.detach().clone()) for key, value in first.items()}
    resumed = build(name, second)
    flat = {key: value.clone() for key, value in flatten_optimizer(optimizer, first).items()}
    restore_optimizer(resumed, second, flat)
    take_steps(resumed, second, stopped_at, 12)
    for key, value in whole.items():
        assert torch.equal(second[key], value), f"{name} {key}"


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_weight_decay_leaves_out_what_it_is_told_to(name: str) -> None:
    with_decay, without = fresh(), fresh()
    take_steps(build(name, with_decay, decay=0.5), with_decay, 0, 3)
    take_steps(build(name, without, decay=0.0), without, 0, 3)
    for key, value in with_decay.items():
        assert torch.equal(value, without[key]) is (value.ndim == 1), key


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_bytes_of_state_are_known_beforehand(name: str) -> None:
    """By a formula, or by watching a step on tensors without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    parameters = fresh()
    optimizer = build(name, parameters)
    take_steps(optimizer, parameters, 0, 1)
    measured = bytes_of_state(optimizer)
    config: OptimizerSettings = OPTIMIZERS[name](**OWN.get(name, {}))  # type: ignore[assignment]
    predicted = config.state_bytes(fresh())
    if predicted is None:
        live = LiveBytes()
        with FakeTensorMode(), live:
            fake = {key: nn.Parameter(torch.zeros(shape)) for key, shape in SHAPES.items()}
            watched = build(name, fake)
            for parameter in fake.values():
                parameter.grad = torch.zeros_like(parameter)
            before = live.now
            watched.step()
            predicted = live.now - before
    assert predicted == pytest.approx(measured, abs=600), "allocations are rounded up to 64 bytes"


def test_groups_learn_at_their_own_rates() -> None:
    for name in ("adamw", "lion", "adafactor", "muon", "schedule_free"):
        parameters = fresh()
        optimizer = OPTIMIZERS[name](learning_rate=1e-3).build(parameters, [1.0, 16.0, 1.0, 1.0])  # type: ignore[attr-defined]
        set_learning_rate(optimizer, 1e-3)
        rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
        assert [rates[id(each)] for each in parameters.values()] == pytest.approx([1e-3, 16e-3, 1e-3, 1e-3])


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydantic import TypeAdapter, ValidationError

    for name, reason in ABSENT.items():
        with pytest.raises(ValidationError) as caught:
            TypeAdapter(OptimizerConfig).validate_python({"type": name})
        assert reason in str(caught.value)
    for name, module in (("adamw_8bit", "bitsandbytes"), ("schedule_free", "schedulefree")):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(ConfigError, match="pip install 'lowrank-llm"):
            build(name, fresh())


def test_pages_without_a_gpu_say_so() -> None:
    for name in ("paged_adamw_8bit", "paged_adamw_32bit"):
        config: Any = OPTIMIZERS[name]()
        (note,) = config.notes(torch.device("cpu"))
        assert "only a GPU's memory can be paged" in note
        assert config.notes(torch.device("cuda")) == []


def test_averages_are_evaluated_and_training_goes_on_as_if_they_were_not() -> None:
    """Schedule-free: between steps the parameters are ahead of the average that a person gets."""
    from lowrank.adapters.variants.lora import LoraConfig
    from lowrank.objectives.sft import SFTConfig
    from tests.tiny_models import make_base, make_engine, random_step

    found: list[Callable[[], dict[str, torch.Tensor]]] = []
    for evaluates in (False, True):
        engine, (slot,) = make_engine(make_base("llama", torch.float32), LoraConfig(rank=2))
        engine.add(slot, SFTConfig().build(), OPTIMIZERS["schedule_free"](), seed=0, neftune_alpha=0.0)  # type: ignore[arg-type]
        job = engine.jobs[slot]
        for step in range(6):
            engine.forward_backward({slot: random_step(step, [9, 20])})
            engine.optim_step(slot, 1e-2)
            if evaluates:
                ahead = engine.forward_backward({slot: random_step(0, [30])})[slot].loss
                job.optimizer.zero_grad()
                assert step == 0 or not math.isclose(ahead, engine.evaluate({slot: random_step(0, [30])})[slot].loss)
        found.append(lambda job=job: {name: value.detach() for name, value in job.parameters.items()})
    never, always = (each() for each in found)
    assert all(torch.equal(never[name], always[name]) for name in never)

"""Mixture-of-Depths: against the definition written out, in pieces and whole, saved and loaded, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import BASE_SLOT, pack
from lowrank.checkpoints.full_model import save_full
from lowrank.config import validate_settings
from lowrank.contrib import mixture_of_depths
from lowrank.contrib.layer_wrappers.mixture_of_depths import MixtureOfDepthsConfig
from lowrank.contrib.mixture_of_depths import Depths
from lowrank.errors import ConfigError, ModelError
from lowrank.generate.generator import Generator
from lowrank.generate.request import GenerationConfig, Prompt
from lowrank.models.base import Base
from lowrank.models.block_expansion import expand
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.checks.isolation import choose_layout, random_documents
from lowrank.models.checks.kv_cache import _in_pieces, kv_cache_mismatch
from lowrank.models.config import ModelConfig
from lowrank.models.layer_wrappers import wrap
from lowrank.models.loading.pretrained import load
from lowrank.objectives.sft import SFTConfig
from lowrank.pipelines.export_source import open_source
from lowrank.pipelines.train import train
from lowrank.planning.memory import StepMemory
from lowrank.planning.simulation import PlannedJob
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.checkpoint_folder import save_checkpoint_folder
from tests.releases import since
from tests.tiny_models import SMALL, make_base, random_step

FAMILIES = ["llama", "qwen2", "gemma2", "gemma3", "mistral", "gpt2", "qwen3_moe", "phi", "olmo2", "cohere2"]


def converted(family: str = "llama", dtype: torch.dtype = torch.float64, capacity: float = 0.4, **shape: Any) -> Base:
    base = make_base(family, dtype, **shape)
    assert base.layout == "packed"
    base.layer_wrapper = wrap(base.model, MixtureOfDepthsConfig(capacity=capacity, every=2))
    return base


def depths_of(base: Base) -> Depths:
    assert isinstance(base.layer_wrapper, Depths)
    return base.layer_wrapper


def written_out(base: Base, document: torch.Tensor, training: bool) -> torch.Tensor:
    """The paper's layer, on one document, with the model's own layers and their own attention: (T, D)."""
    model = base.model.model
    depths = depths_of(base)
    x = model.embed_tokens(document[None])
    places = torch.arange(len(document))[None]
    for index, layer in enumerate(model.layers):
        rows = torch.arange(len(document))
        router = depths.routers.get(index)
        if router is not None:
            unit = x[0] / (x[0].square().mean(-1, keepdim=True) + 1e-6).sqrt()
            best = (unit @ router.score_D).topk(mixture_of_depths.share_of(len(document), depths.capacity)).indices
            predicted = (unit @ router.predictor_D + router.predictor_bias > 0).nonzero()[:, 0]
            rows = best.sort().values if training else predicted
        if not len(rows):
            continue
        part = x[:, rows]
        hidden = torch.full((len(rows), len(rows)), float("-inf"), dtype=x.dtype).triu(1)[None, None]
        family = type(layer) if router is None else type(layer).__bases__[-1]
        forward = family.forward  # without what was put around it
        result = forward(
            layer,
            part,
            attention_mask=hidden,
            position_ids=places[:, rows],
            position_embeddings=model.rotary_emb(part, places[:, rows]),
        )
        gate = 1.0 if router is None else 2 * torch.sigmoid(unit[rows] @ router.score_D)[:, None]
        x = x.index_add(1, rows, (result - part) * gate)
    return model.norm(x)[0]


@pytest.mark.parametrize("training", [True, False])
def test_equals_the_definition_in_every_document(training: bool) -> None:
    """Three documents in one stream, as in training and as afterwards; the gradients of every weight too."""
    base = converted()
    base.model.requires_grad_(True)
    segments = random_step(0, [11, 23, 6])
    hidden_TD = base.hidden(pack([(BASE_SLOT, each) for each in segments]), training=training)
    weight_TD = torch.randn(hidden_TD.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    named = {name: value for name, value in base.model.named_parameters() if "predictor" not in name}
    ours = torch.autograd.grad((hidden_TD * weight_TD).sum(), list(named.values()), allow_unused=True)
    with base.using_attention("sdpa"):
        expected = torch.cat([written_out(base, torch.from_numpy(each.token_L), training) for each in segments])
    torch.testing.assert_close(hidden_TD, expected, rtol=1e-9, atol=1e-10)
    theirs = torch.autograd.grad((expected * weight_TD).sum(), list(named.values()), allow_unused=True)
    for name, one, other in zip(named, ours, theirs):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=name)
    assert any("score_D" in name and other is not None for name, other in zip(named, theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_in_pieces_and_whole(family: str) -> None:
    """Each layer keeps its own tokens in the pages, however a text is cut; some go through and some do not."""
    base = converted(family)
    documents = random_documents(base, 0)
    with torch.no_grad():
        pieces = _in_pieces(base, documents)
        whole = [base.hidden(pack([(BASE_SLOT, segment_of(each))])) for each in documents]
        plain = make_base(family)
    for one, other in zip(pieces, whole):
        torch.testing.assert_close(one, other.double(), rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        everything = plain.hidden(pack([(BASE_SLOT, segment_of(documents[0]))]))
    assert not torch.allclose(everything, whole[0]), "some tokens pass by"


def segment_of(token_L: torch.Tensor) -> Any:
    from lowrank.segments import Segment

    return Segment(token_L.numpy(), torch.zeros(len(token_L)).numpy())


def test_an_answer_is_what_whole_texts_give() -> None:
    base = converted(dtype=torch.float64)
    given = random_step(3, [7, 12])
    generator = Generator(base, Bank(base))
    assert generator.notice is None
    settings = GenerationConfig(temperature=0.0, max_new_tokens=8)
    answers = [generator.submit(Prompt(each.token_L, BASE_SLOT), settings) for each in given]
    for segment, answer in zip(given, answers):
        tokens = segment.token_L.tolist()
        for _ in range(8):
            with torch.no_grad():
                last_D = base.hidden(pack([(BASE_SLOT, segment_of(torch.tensor(tokens)))]))[-1]
            tokens.append(int(base.head().logits(last_D[None]).argmax()))
        assert answer.result().tokens == tokens[len(segment) :]


def gradients(base: Base, micro_batch_tokens: int, activation_checkpointing: str) -> dict[str, torch.Tensor]:
    base.model.requires_grad_(True)
    set_activation_checkpointing(base.model, activation_checkpointing)
    engine = Engine(base, Bank(base), micro_batch_tokens)
    engine.add(BASE_SLOT, SFTConfig().build(), AdamWConfig(), seed=0, neftune_alpha=0.0)  # type: ignore[arg-type]
    engine.forward_backward({BASE_SLOT: random_step(0, [20, 17, 12])})
    found = {name: each.grad for name, each in engine.jobs[BASE_SLOT].parameters.items() if each.grad is not None}
    assert found
    return found


@pytest.mark.parametrize("activation_checkpointing", ["full", "selective", "sqrt"])
def test_how_a_step_is_cut_and_recomputed_changes_nothing(activation_checkpointing: str) -> None:
    """The predictor's loss too reaches its weights, once, from layers that are computed again."""
    whole, cut = gradients(converted(), 4096, "none"), gradients(converted(), 20, activation_checkpointing)
    assert whole.keys() == cut.keys()
    assert any("predictor_D" in name for name in whole)
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_filler_teaches_nothing() -> None:
    """In 16 bits a stream has a document of nobody's at its end."""
    whole = gradients(converted(dtype=torch.bfloat16), 4096, "none")
    exact = converted(dtype=torch.bfloat16)
    exact.filled = lambda batch: batch  # type: ignore[method-assign]
    for name, value in gradients(exact, 4096, "none").items():
        if "depth_router" in name:
            error = (whole[name] - value).norm() / value.norm()
            assert error < 0.02, (name, error)


def chosen_rows(base: Base, engine: Engine, segments: list[Any], training: bool) -> set[int]:
    """Which tokens of the stream went through the one converted layer."""
    depths = depths_of(base)
    seen: list[Any] = []
    part = depths.part
    depths.part = lambda *given: seen.append(part(*given)) or seen[-1]  # type: ignore[method-assign]
    with torch.no_grad():
        base.hidden(pack([(BASE_SLOT, each) for each in segments]), training=training)
    depths.part = part  # type: ignore[method-assign]
    (found,) = seen
    return set(found.index_K.tolist()) if found else set()


def test_the_predictor_learns_who_is_chosen() -> None:
    base = converted(dtype=torch.float32, capacity=0.25)
    base.model.requires_grad_(True)
    engine = Engine(base, Bank(base), 4096)
    engine.add(BASE_SLOT, SFTConfig().build(), AdamWConfig(learning_rate=1e-2), seed=0, neftune_alpha=0.0)  # type: ignore[arg-type]
    segments = random_step(0, [40] * 8)

    def hit_and_number() -> tuple[float, float]:
        best, predicted = (chosen_rows(base, engine, segments, training) for training in (True, False))
        return len(best & predicted) / len(best), len(predicted) / len(best)

    before = hit_and_number()
    for _ in range(60):
        engine.forward_backward({BASE_SLOT: segments})
        engine.optim_step(BASE_SLOT, 1e-2)
    hit, number = hit_and_number()
    assert len(chosen_rows(base, engine, segments, True)) == 80
    assert before[0] < 0.7, before
    assert hit > 0.65, (before, hit, number)  # a quarter by chance; the choices still move
    assert 0.7 < number < 1.3, (before, number)
    assert engine.evaluate({BASE_SLOT: segments})[BASE_SLOT].loss < 0.1, "the model learns, and the predictor serves it"


def test_saved_and_loaded(tmp_path: Path) -> None:
    save_checkpoint_folder(tmp_path / "plain")
    requested = ModelConfig(
        path=str(tmp_path / "plain"), device="cpu", dtype="float32", layer_wrapper=MixtureOfDepthsConfig()
    )
    base = load(requested, train_all=True, notify=fail)
    depths = depths_of(base)
    with torch.no_grad():
        for router in depths.routers.values():
            router.predictor_bias += 0.5
    save_full(tmp_path / "mixture", base.model, base.tokenizer.save_pretrained)
    again = load(ModelConfig(path=str(tmp_path / "mixture"), device="cpu", dtype="float32"), notify=fail)
    batch = pack([(BASE_SLOT, each) for each in random_step(0, [20, 9], 30)])
    with torch.no_grad():
        assert torch.equal(base.hidden(batch), again.hidden(batch))
        assert not torch.equal(base.hidden(batch, training=True), base.hidden(batch))
    assert kv_cache_mismatch(again) is None
    load(ModelConfig(path=str(tmp_path / "mixture"), device="cpu", layer_wrapper=MixtureOfDepthsConfig()), notify=fail)
    other = ModelConfig(path=str(tmp_path / "mixture"), device="cpu", layer_wrapper=MixtureOfDepthsConfig(capacity=0.3))
    with pytest.raises(ModelError, match="is converted already"):
        load(other, notify=fail)
    with pytest.raises(ModelError, match="adapters are not trained on such layers"):
        Bank(again).add(LoraConfig(rank=2), seed=0)  # type: ignore[arg-type]
    for path, requested in ((tmp_path / "mixture", None), (tmp_path / "plain", MixtureOfDepthsConfig())):
        packed = ModelConfig(path=str(path), device="cpu", storage={"type": "nf4"}, layer_wrapper=requested)  # type: ignore[arg-type]
        with pytest.raises(ModelError, match="packed weights are not trained"):
            load(packed, notify=fail)
    with pytest.raises(ModelError, match="float16 gradients are scaled"):
        load(ModelConfig(path=str(tmp_path / "mixture"), device="cpu", dtype="float16"), train_all=True, notify=fail)
    with pytest.raises(ModelError, match="there is nothing to export"):
        open_source(str(tmp_path / "mixture"))
    with pytest.raises(ModelError, match="no copies are made of such layers"):
        expand(again.model, 1)


def fail(sentence: str) -> None:
    """Nothing is to be said: the routers are no tensors without a place."""
    raise AssertionError(sentence)


@since("5.24", "Falcon's attention receives the boundaries of sequences")
def test_models_that_cannot_be_converted() -> None:
    base = make_base("falcon")
    base.layer_wrapper = mixture_of_depths.convert(base.model, 0.5, 2)
    assert "no tokens can be chosen" in (kv_cache_mismatch(base) or "")
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 2
    shape = {**SMALL, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8, "global_head_dim": 8}
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": SMALL["vocab_size"]}
    config = transformers.Gemma4TextConfig(**shape, **per_layer, layer_types=kinds, sliding_window=8)
    shared = Base(transformers.AutoModelForCausalLM.from_config(config).double().eval(), None, "gemma4")
    choose_layout(shared, "auto")
    assert (shared.layout, kv_cache_mismatch(shared)) == ("packed", None)
    shared.layer_wrapper = mixture_of_depths.convert(shared.model, 0.4, 2)
    assert kv_cache_mismatch(shared) is not None, (
        "its last layers take the keys of earlier ones, which are of other tokens"
    )
    with pytest.raises(ModelError, match="every: 3 names none"):
        mixture_of_depths.convert(make_base("llama").model, 0.5, 3)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tuning": "adapter"}, r"set tuning: full"),
        ({"tuning": "freeze"}, r"set tuning: full"),
        ({"objective": "dpo"}, r"objective dpo compares log-probabilities"),
        (
            {"model": {"path": "m", "layer_wrapper": "mixture_of_depths", "attention": "padded"}},
            "only where attention is packed",
        ),
        (
            {"model": {"path": "m", "layer_wrapper": "mixture_of_depths", "shift_attn": 64}},
            "only where attention is packed",
        ),
        ({"model": {"path": "m", "layer_wrapper": {"type": "mixture_of_depths", "capacity": 1.5}}}, "capacity"),
    ],
)
def test_what_it_cannot_be_combined_with(changes: dict[str, Any], problem: str) -> None:
    config = {
        "model": {"path": "m", "layer_wrapper": "mixture_of_depths"},
        "tuning": "full",
        "data": "d",
        "output_dir": "o",
    }
    validate_settings(config)
    with pytest.raises(ConfigError, match=problem):
        validate_settings(config | changes)


@pytest.mark.slow
def test_the_plan_knows_that_less_is_kept(tmp_path: Path) -> None:
    base = make_base("llama", torch.bfloat16, num_hidden_layers=4, hidden_size=64, intermediate_size=256)
    base.model.save_pretrained(tmp_path / "model")
    job = PlannedJob(None, SFTConfig().build(), AdamWConfig(), random_step(0, [64] * 4))  # type: ignore[arg-type]
    plans = [
        StepMemory(ModelConfig(path=str(tmp_path / "model"), device="cpu", layer_wrapper=requested), [job]).step(
            4096, "none"
        )
        for requested in (None, MixtureOfDepthsConfig())
    ]
    of_layers = [plan.activations for plan in plans]
    assert of_layers[1] < 0.75 * of_layers[0]


@pytest.mark.slow
def test_a_run_stops_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def run(name: str, steps: int, **more: Any) -> bytes:
        config = {
            "model": {
                "path": "lowrank/tiny",
                "device": "cpu",
                "dtype": "bfloat16",
                "layer_wrapper": "mixture_of_depths",
            },
            "tuning": "full",
            "data": {"train": {"path": "lowrank/demo", "max_samples": 16}, "batch_size": 2},
            "schedule": "constant",
            "max_steps": steps,
            "output_dir": str(tmp_path / name),
            **more,
        }
        train(validate_settings(config))
        return (tmp_path / name / "default" / "last" / "model.safetensors").read_bytes()

    whole = run("whole", 4)
    run("cut", 2)
    assert run("cut", 4, resume=True) == whole

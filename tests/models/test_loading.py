"""From files to a base that is known to work; everything that can be wrong with them has its own sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import pack
from lowrank.errors import ModelError
from lowrank.generate.sampler import GenerationConfig, Prompt, generate
from lowrank.models.base import Base
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.checks.isolation import check_head, choose_layout
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import choose_device, choose_dtype, load, load_tokenizer
from tests.checkpoint_folder import save_checkpoint_folder
from tests.models.leaky_model import make_mixer
from tests.tiny_models import FAMILIES, SMALL, make_base, make_engine, make_model, random_step

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint."""
    return save_checkpoint_folder(tmp_path / "model")


def change_weights(folder: Path, **changes: Any) -> None:
    """Replace or, with None, delete tensors; dots are written as double underscores."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if value is not None:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def config_of(folder: Path, **SMALL: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), dtype="float32", device="cpu", **SMALL)


def test_a_good_checkpoint(folder: Path) -> None:
    described: list[str] = []
    base = load(config_of(folder), notify=described.append)
    assert described == []
    assert (base.layout, base.dtype, base.device.type) == ("packed", torch.float32, "cpu")
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.tokenizer.decode(base.tokenizer("Guten Tag")["input_ids"]) == "Guten Tag"
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(base.model.state_dict()[NAME], saved[NAME])


def test_train_all_unfreezes_the_base(folder: Path) -> None:
    base = load(config_of(folder), train_all=True)
    assert all(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training


def test_double_precision_runs_mixtures(tmp_path: Path) -> None:
    folder = save_checkpoint_folder(tmp_path / "model")
    model = make_model("mixtral", torch.float32)
    model.save_pretrained(folder)
    assert load(ModelConfig(path=str(folder), dtype="float64", device="cpu")).layout == "packed"


def test_weights_only_as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"only pickled \.bin weights, .*convert them to safetensors"):
        load(config_of(folder))


def test_missing_and_misshapen_weights_are_all_listed(folder: Path) -> None:
    change_weights(folder, model__layers__1__mlp__up_proj__weight=None, model__norm__weight=None)
    change_weights(folder, model__layers__0__mlp__up_proj__weight=torch.zeros(3, 5))
    with pytest.raises(ModelError) as caught:
        load(config_of(folder))
    text = str(caught.value)
    assert "model.layers.1.mlp.up_proj.weight: not in the checkpoint" in text
    assert "model.norm.weight: not in the checkpoint" in text
    assert f"{NAME}: shape (3, 5) in the checkpoint, (48, 32) in the model" in text
    assert text.count("\n") == 3


def test_weights_without_a_place_are_mentioned(folder: Path) -> None:
    change_weights(folder, model__layers__7__mlp__up_proj__weight=torch.zeros(48, 32))
    described: list[str] = []
    load(config_of(folder), notify=described.append)
    assert described == [
        "the checkpoint has tensors this model has no place for; they are not used (1): "
        "model.layers.7.mlp.up_proj.weight"
    ]


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_a_damaged_weight_file(folder: Path, kept: float) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(len(whole) * kept)] or b"<html>")
    with pytest.raises(ModelError, match="damaged or was not downloaded to its end"):
        load(config_of(folder))


def test_custom_code_is_refused_and_not_run(folder: Path) -> None:
    change_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match=r"its own Python code: read it, then set model\.trust_remote_code: true"):
        load(config_of(folder))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda folder: (folder / "config.json").write_text("{"),
            r"config\.json: .*JSON.*; get this file again",
        ),
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json, so it is no model's folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no weights: model\.safetensors, or its shards"),
        (lambda folder: change_config(folder, model_type="nonesuch"), r"'nonesuch', which the installed transformers"),
        (lambda folder: change_config(folder, model_type=None), "no model_type"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "a model without its tokenizer"),
    ],
)
def test_broken_folders(folder: Path, break_it: Any, message: str) -> None:
    break_it(folder)
    with pytest.raises(ModelError, match=message):
        load(config_of(folder))


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder here"):
        load_tokenizer(config_of(tmp_path / "nonesuch"))


def test_a_model_that_is_no_causal_lm(folder: Path) -> None:
    config = transformers.T5Config(d_model=32, d_kv=8, num_layers=1, num_heads=2, d_ff=32, vocab_size=259)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"'t5' .T5ForConditionalGeneration., an encoder-decoder"):
        load(config_of(folder))


@pytest.mark.parametrize("device", ["banana", "cuda:99", "mps", "meta", "xpu"])
def test_wrong_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"model\.device"):
        choose_device(ModelConfig(path="x", device=device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_cuda_here() -> None:
    with pytest.raises(ModelError, match="no CUDA device that torch can use; say cpu or auto"):
        choose_device(ModelConfig(path="x", device="cuda"))
    assert choose_device(ModelConfig(path="x")).type == "cpu"


def test_dtype_is_what_was_asked_for() -> None:
    cpu = torch.device("cpu")
    for name in ("bfloat16", "float16", "float32", "float64"):
        assert choose_dtype(ModelConfig(path="x", dtype=name), cpu) == getattr(torch, name)
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    assert choose_dtype(ModelConfig(path="x"), cpu) == (torch.bfloat16 if fast else torch.float32)


def test_a_model_that_ignores_boundaries_runs_padded() -> None:
    base = Base(make_mixer(mixing="causal"), None, "mixer")
    check_head(base)
    notice = choose_layout(base, "auto")
    assert base.layout == "padded"
    assert notice is not None
    assert "one document per padded row" in notice
    documents = random_step(0, [5, 11, 1])
    together = base.hidden(pack([(-1, document) for document in documents]))
    alone = torch.cat([base.hidden(pack([(-1, document)])) for document in documents])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixing", ["both ways", "batch"])
@pytest.mark.parametrize("wanted", ["auto", "padded"])
def test_a_model_that_ignores_masks_too_is_refused(mixing: str, wanted: str) -> None:
    with pytest.raises(ModelError, match=r"mixer .lowrank_test_mixer. cannot be trained: .*padded, (one|a) document"):
        choose_layout(Base(make_mixer(mixing=mixing), None, "mixer"), wanted)


def test_packed_on_demand_is_refused_where_it_leaks() -> None:
    with pytest.raises(ModelError, match=r"mixer cannot run packed: .*Set model\.attention to auto or padded"):
        choose_layout(Base(make_mixer(mixing="causal"), None, "mixer"), "packed")


def test_padded_on_demand_where_packed_would_do() -> None:
    base = make_base("llama")
    assert choose_layout(base, "padded") is None
    assert base.layout == "padded"


def test_unknown_changes_to_the_logits_are_refused() -> None:
    with pytest.raises(ModelError, match="do more to their logits than one matrix"):
        check_head(Base(make_mixer(logit_factor=2.0), None, "mixer"))


LOCAL = {
    # windows wider than the leak test's documents, known to these families' masks alone
    "phimoe": lambda: transformers.PhimoeConfig(sliding_window=16, num_local_experts=4, **SMALL),
    "llama4": lambda: transformers.Llama4TextConfig(
        attention_chunk_size=16, head_dim=8, num_local_experts=2, intermediate_size_mlp=48, **SMALL
    ),
}


@pytest.mark.parametrize("family", LOCAL)
def test_windows_that_only_the_mask_knows_are_found(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed, such a model would see all of a long document: the test at load must notice with a dozen tokens."""
    monkeypatch.setitem(FAMILIES, family, LOCAL[family])
    base = make_base(family, torch.float32)
    assert base.layout == "padded"
    (document,) = random_step(0, [40])
    with torch.no_grad(), base.using_attention("eager"):
        expected = base.backbone(input_ids=torch.from_numpy(document.token_L)[None], use_cache=False).last_hidden_state
    torch.testing.assert_close(base.hidden(pack([(-1, document)])), expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "cohere2", "gpt_oss", "phi3"])
def test_windows_are_as_before_after_the_test(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A usual window of thousands stays packed, and the test leaves it alone."""
    tiny = FAMILIES[family]
    monkeypatch.setitem(FAMILIES, family, lambda: _with_window(tiny(), 4096))
    base = make_base(family, torch.float32)
    assert base.layout == "packed"
    assert base.model.config.sliding_window == 4096
    windows = {getattr(module, "sliding_window", None) for module in base.model.modules()}
    assert windows <= {None, 4096}


def _with_window(config: Any, window: int) -> Any:
    config.sliding_window = window
    return config


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "falcon"])
def test_recompute_really_recomputes_and_keeps_less(family: str) -> None:
    """Layers run twice in a training step and once in evaluation; the base's own dropout (OPT: 0.1) stays off."""
    work = random_step(3, [9, 20, 6])
    outcomes = []
    for policy in ("none", "full", 1):
        base = make_base(family)
        engine, (slot,) = make_engine(base, LoraConfig(rank=2))
        set_activation_checkpointing(base.model, policy)
        calls: list[int] = []
        first = next(iter(engine.bank.slots[slot].layers))
        base.model.get_submodule(first).base.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        loss = engine.forward_backward({slot: work})[slot].loss
        trained = len(calls)
        evaluated = engine.evaluate({slot: work})[slot].loss
        outcomes.append((trained, len(calls) - trained, loss, evaluated))
    assert [entry[:2] for entry in outcomes] == [(1, 1), (2, 1), (2, 1)]
    assert {entry[2] for entry in outcomes} == {outcomes[0][2]}
    assert {entry[3] for entry in outcomes} == {outcomes[0][3]}


@pytest.mark.parametrize("policy", ["full", 1])
def test_answers_are_the_same_with_recompute(policy: str | int) -> None:
    """transformers takes the cache away from layers that recompute: generation must not be such a case."""
    answers = []
    for each in ("none", policy):
        base = make_base("llama")
        engine, (slot,) = make_engine(base, LoraConfig(rank=2))
        set_activation_checkpointing(base.model, each)
        engine.forward_backward({slot: random_step(0, [9])})
        prompt = Prompt(np.arange(3, 12), slot)
        answers.append(
            generate(base, engine.bank, [prompt], GenerationConfig(max_new_tokens=8), stop_tokens=frozenset())
        )
    assert answers[0] == answers[1]


def test_recompute_where_there_are_no_layers_to_recompute() -> None:
    with pytest.raises(ModelError, match="MixerForCausalLM does not support it; leave it at none"):
        set_activation_checkpointing(make_mixer(), "full")

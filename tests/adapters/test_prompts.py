"""The contract of virtual tokens, PEFT as oracle. A new file with a `PromptSettings` is tested by being there."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from lowrank.adapters.bank import Bank
from lowrank.adapters.prompts import TABLE, PromptSettings
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.adapters.variants.p_tuning import PromptEncoderConfig
from lowrank.adapters.variants.prefix_tuning import PrefixTuningConfig
from lowrank.adapters.variants.prompt_tuning import PromptTuningConfig
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import load_adapter, save_adapter
from lowrank.errors import ModelError
from lowrank.evaluate.likelihood import continuation_logprobs, label_logprobs
from lowrank.export.targets.lora_gguf import LoraGGUFExportConfig
from lowrank.export.targets.merged import MergedExportConfig
from lowrank.export.targets.peft import PeftExportConfig
from lowrank.generate.generator import Generator, GeneratorConfig
from lowrank.generate.request import GenerationConfig, Prompt, RequestError
from lowrank.generate.sampler import generate
from lowrank.models.config import ModelConfig
from lowrank.planning.memory import StepMemory
from lowrank.segments import Segment, number_the_step
from lowrank.settings import configs_in
from tests.adapters.isolation import assert_isolated
from tests.adapters.peft_twins import on_disk
from tests.export.sources import source_of
from tests.peft_oracle import plain_loss
from tests.planning.test_memory import folder_of, measured, planned
from tests.tiny_models import make_base, make_engine, make_model, random_step

K = 5
PROMPTS: dict[str, Any] = {
    name: config(num_virtual_tokens=K)
    for name, config in configs_in("lowrank.adapters.variants").items()
    if issubclass(config, PromptSettings)
}
CASES: dict[str, Any] = {
    **PROMPTS,
    "p_tuning lstm": PromptEncoderConfig(
        num_virtual_tokens=K, encoder_reparameterization_type="LSTM", encoder_hidden_size=16
    ),
    "prefix_tuning projection": PrefixTuningConfig(
        num_virtual_tokens=K, prefix_projection=True, encoder_hidden_size=12
    ),
}
PEERS: dict[str, Any] = {
    "prompt_tuning": peft.PromptTuningConfig(num_virtual_tokens=K, task_type="CAUSAL_LM"),
    "p_tuning": peft.PromptEncoderConfig(num_virtual_tokens=K, task_type="CAUSAL_LM"),
    "p_tuning lstm": peft.PromptEncoderConfig(
        num_virtual_tokens=K, task_type="CAUSAL_LM", encoder_reparameterization_type="LSTM", encoder_hidden_size=16
    ),
    "prefix_tuning": peft.PrefixTuningConfig(num_virtual_tokens=K, task_type="CAUSAL_LM"),
    "prefix_tuning projection": peft.PrefixTuningConfig(
        num_virtual_tokens=K, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=12
    ),
}
slow = pytest.mark.slow
PLANNED_TOO = ("prompt_tuning", "p_tuning", "prefix_tuning projection")
every_case = pytest.mark.parametrize("case", CASES)
every_prompt = pytest.mark.parametrize("name", PROMPTS)


def families(first: str, *others: str) -> Any:
    """The others are slow only together."""
    return pytest.mark.parametrize("family", [first, *(pytest.param(other, marks=slow) for other in others)])


@pytest.fixture(autouse=True)
def _peft_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(encoder_num_layers|Position ids|past_key_values).*")
        yield


class Peer:
    """PEFT's model, asked about the words alone."""

    def __init__(self, twin: Any) -> None:
        self.twin = twin

    def __call__(self, input_ids: torch.Tensor) -> Any:
        logits = self.twin(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
        return SimpleNamespace(logits=logits[:, -input_ids.shape[1] :])


def peer_of(case: str, family: str, ours: dict[str, torch.nn.Parameter]) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """PEFT's method on the same model with our values, and its parameters by our names."""
    twin = peft.get_peft_model(make_model(family), copy.deepcopy(PEERS[case])).double().eval()
    own = {
        key.removeprefix("prompt_encoder.default."): value
        for key, value in twin.named_parameters()
        if value.requires_grad
    }
    theirs = {TABLE if TABLE in ours else key: value for key, value in own.items()}
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    with torch.no_grad():
        for key, value in theirs.items():
            value.copy_(ours[key])
    return twin, theirs


def test_every_file_has_a_peer() -> None:
    assert PEERS.keys() == CASES.keys()
    assert PROMPTS.keys() >= {"prompt_tuning", "p_tuning", "prefix_tuning"}


@families("llama", "qwen3", "gpt2", "gemma2")
@every_case
def test_losses_and_gradients_equal_pefts_beside_lora_jobs(case: str, family: str) -> None:
    """Slot 1 of 3 in float64; three AdamW steps; grouped-query attention, wide heads, learned positions, windows."""
    engine, (before, slot, behind) = make_engine(
        make_base(family), LoraConfig(rank=4), CASES[case], LoraConfig(rank=2), learning_rate=1e-2
    )
    ours = engine.bank.parameters(slot)
    twin, theirs = peer_of(case, family, ours)
    tolerance = 1e-6 if family == "gemma2" else 1e-11  # transformers takes its softmax in float32
    optimizer = torch.optim.AdamW([theirs[key] for key in ours], lr=1e-2, weight_decay=0.0)
    for step in range(3):
        work = {each: random_step(10 * step + each, [5 + each, 9, 14]) for each in (before, slot, behind)}
        loss = plain_loss(Peer(twin), work[slot])
        loss.backward()
        forwarded = engine.forward_backward(work)
        assert forwarded[slot].loss == pytest.approx(loss.item(), abs=tolerance)
        assert forwarded[slot].tokens == 6 + 9 + 14  # virtual tokens are in no number
        for key, value in ours.items():
            assert value.grad is not None
            torch.testing.assert_close(value.grad, theirs[key].grad, rtol=1e3 * tolerance, atol=tolerance, msg=key)
        if family == "gemma2":
            return
        torch.nn.utils.clip_grad_norm_([theirs[key] for key in ours], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for each in work:
            engine.optim_step(each, 1e-2)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-7, msg=key)


@every_case
def test_neighbors_do_not_see_it(case: str) -> None:
    """Losses and gradients of all jobs, together in small pieces and alone; a prompt that is NaN is its own affair."""
    configs = (LoraConfig(rank=4), CASES[case], LoraConfig(rank=2), CASES[case])
    engine, slots = make_engine(make_base("llama"), *configs)
    work = {slot: random_step(slot, [5 + slot, 9, 14, 3]) for slot in slots}
    grads = assert_isolated(engine, slots, work)
    assert all(grads[slot].keys() == engine.bank.parameters(slot).keys() for slot in slots)


@every_prompt
def test_answers_to_one_prompt_share_it_and_its_virtual_tokens(name: str) -> None:
    """The pairs of preference jobs, with and without sharing: losses, gradients, log-probabilities."""
    engine, (lora, slot) = make_engine(make_base("llama"), LoraConfig(rank=2), PROMPTS[name])
    prompt_L, answers = np.arange(10, 24), [np.arange(30, 35), np.arange(40, 48)]
    pairs = [
        Segment(np.r_[prompt_L + pair, each], np.r_[np.zeros(14), np.ones(len(each))].astype(np.float32), pair=pair)
        for pair in (0, 1)
        for each in answers
    ]
    work = {lora: number_the_step(pairs), slot: number_the_step(pairs)}
    found = []
    for shares in (False, True):
        engine.shares_prompts = shares
        assert any(any(batch.prefixes) for batch in engine.micro_batches(work)) == shares
        losses = {each: forwarded.loss for each, forwarded in engine.forward_backward(work).items()}
        grads = [p.grad.clone() for p in engine.bank.parameters(slot).values() if p.grad is not None]
        found.append((losses, grads, engine.logprobs(slot, pairs)))
        engine.jobs[slot].optimizer.zero_grad()
    (losses, grads, described), (shared_losses, shared_grads, shared_described) = found
    assert shared_losses == pytest.approx(losses, abs=1e-11)
    for one, other in zip(grads, shared_grads):  # Llama's norms round to float32 on the way
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-8)
    for one_L, other_L in zip(described, shared_described):
        np.testing.assert_allclose(one_L, other_L, atol=1e-6)


@pytest.mark.parametrize(
    "activation_checkpointing", ["full", pytest.param("sqrt", marks=slow), pytest.param("selective", marks=slow)]
)
@every_prompt
def test_recomputed_layers_give_the_same_gradients(name: str, activation_checkpointing: str) -> None:
    from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing

    engine, (slot,) = make_engine(make_base("llama"), PROMPTS[name])
    work = {slot: random_step(0, [5, 9, 14])}
    kept = []
    for how in ("none", activation_checkpointing):
        set_activation_checkpointing(engine.base.model, how)
        engine.forward_backward(work)
        kept.append([p.grad.clone() for p in engine.bank.parameters(slot).values() if p.grad is not None])
        engine.jobs[slot].optimizer.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*kept))


@families("llama", "qwen3", "gpt2")
@every_prompt
def test_ours_to_peft_and_back(name: str, family: str, tmp_path: Path) -> None:
    engine, (slot,) = make_engine(make_base(family), PROMPTS[name])
    token_L = np.arange(3, 12)
    reads = [(slot, token_L[:1].tolist(), [int(token)]) for token in range(3, 60)]
    base = describe_base(engine.base.model, family)
    save_adapter(tmp_path / "a", on_disk(engine.bank, slot), base, dtype=None)
    assert load_file(tmp_path / "a" / "adapter_model.safetensors").keys() == {TABLE}
    twin = Peer(
        peft.PeftModel.from_pretrained(make_model(family), str(tmp_path / "a"), autocast_adapter_dtype=False).double()
    )
    with torch.no_grad():
        theirs_LV = twin(torch.from_numpy(token_L)[None]).logits[0].log_softmax(-1)
    segment = Segment(token_L, np.r_[0, np.ones(8)].astype(np.float32))
    ours_L = engine.logprobs(slot, [segment])[0]
    assert ours_L.shape == token_L.shape
    expected_L = theirs_LV[:-1].gather(1, torch.from_numpy(token_L)[1:, None])[:, 0]
    np.testing.assert_allclose(ours_L[1:], expected_L.numpy(), atol=1e-6)
    bare_L = engine.logprobs(-1, [segment])[0]
    assert np.abs(bare_L - ours_L).max() > 1e-3
    saved = load_adapter(tmp_path / "a")
    other = Bank(make_base(family))
    again = other.add(saved.config, seed=9)
    other.load(again, saved.tensors)
    mine, theirs = (
        [
            described
            for described, _ in continuation_logprobs(
                bank.base, bank, [(own, context, answer) for _, context, answer in reads]
            )
        ]
        for bank, own in ((engine.bank, slot), (other, again))
    )
    np.testing.assert_allclose(mine, theirs, atol=1e-10)
    sums = label_logprobs(engine.base, engine.bank, [(slot, segment), (-1, segment)])
    np.testing.assert_allclose(sums[:, 0], [ours_L.sum(), bare_L.sum()], atol=1e-5)
    assert sums[:, 1].tolist() == [8, 8]


@pytest.mark.parametrize("case", CASES)
def test_pefts_to_ours(case: str, tmp_path: Path) -> None:
    twin = peft.get_peft_model(make_model("llama"), copy.deepcopy(PEERS[case])).double().eval()
    twin.save_pretrained(str(tmp_path / "a"))
    saved = load_adapter(tmp_path / "a")
    bank = Bank(make_base("llama"))
    slot = bank.add(saved.config, seed=0)
    bank.load(slot, saved.tensors)
    token_L = torch.tensor([5, 9, 11, 3, 8])
    with torch.no_grad():
        theirs = Peer(twin)(token_L[None]).logits[0].log_softmax(-1)[-1]
    ours = continuation_logprobs(bank.base, bank, [(slot, token_L.tolist(), [token]) for token in range(97)])
    np.testing.assert_allclose(
        [described for described, _ in ours], theirs.numpy(), atol=1e-6
    )  # files of P-tuning are float32


@families("llama", "gpt2")
@every_case
def test_answers_equal_pefts(case: str, family: str) -> None:
    """Greedy, beside the bare base and a LoRA, in pieces of 4 tokens, a second time from the kept pages. The peer reads
    all for each token: `generate` of PEFT 0.21 under transformers 5.24 gives other tokens than its own forward."""
    engine, (lora, slot) = make_engine(make_base(family), LoraConfig(rank=4), CASES[case])
    twin, _ = peer_of(case, family, engine.bank.parameters(slot))
    token_L = np.array([5, 9, 11, 3, 8, 7])
    theirs = token_L.tolist()
    with torch.no_grad():
        for _ in range(12):
            theirs.append(int(Peer(twin)(torch.tensor(theirs)[None]).logits[0, -1].argmax()))
    alone = {
        each: generate(
            engine.base,
            engine.bank,
            [Prompt(token_L, each)],
            GenerationConfig(max_new_tokens=12),
            stop_tokens=frozenset(),
        )[0]
        for each in (-1, lora)
    }
    generator = Generator(engine.base, engine.bank, GeneratorConfig(max_num_batched_tokens=4))
    for _ in range(2):
        requested = {
            each: generator.submit(Prompt(token_L, each), GenerationConfig(max_new_tokens=12))
            for each in (slot, -1, lora)
        }
        answers = {each: generation.result() for each, generation in requested.items()}
        assert answers[slot].tokens == theirs[6:]
        assert answers[slot].prompt_tokens == 6
        assert {each: answers[each].tokens for each in alone} == alone
    assert generator.base.max_positions == 64
    reach = generator.submit(Prompt(token_L, slot), GenerationConfig(max_new_tokens=500)).result()
    assert len(reach.tokens) == 64 - 6 - K


def test_repetition_is_counted_over_words_alone() -> None:
    """Virtual tokens are no token 0 that was said."""
    engine, (slot,) = make_engine(make_base("llama"), PROMPTS["prompt_tuning"])
    config = GenerationConfig(max_new_tokens=1, logit_bias={0: 1000.0}, repetition_penalty=1e6)
    found = generate(engine.base, engine.bank, [Prompt(np.array([5, 9]), slot)], config, stop_tokens=frozenset())
    assert found == [[0]]


@every_case
def test_resumes_to_the_same_bits(case: str) -> None:
    engine, (slot,) = make_engine(make_base("llama"), CASES[case])
    engine.forward_backward({slot: random_step(0, [9, 14])})
    engine.optim_step(slot, 1e-2)
    state, saved = engine.bank.state(slot), engine.bank.saved(slot)
    again, (other,) = make_engine(make_base("llama"), CASES[case])
    if state:
        again.bank.load_state(other, state)
    else:
        again.bank.load(other, saved.tensors)
    for key, value in engine.bank.parameters(slot).items():
        assert torch.equal(value, again.bank.parameters(other)[key]), key
    assert (case in ("prompt_tuning", "prefix_tuning")) == (not state)
    if state:
        with pytest.raises(ModelError, match="do not hold the encoder"):
            again.bank.load(other, saved.tensors)


def test_starts() -> None:
    """From the vocabulary, from a text, or from random numbers; a slot that leaves frees its place."""
    base = make_base("llama")
    base.tokenizer = lambda text: {"input_ids": [ord(letter) - 90 for letter in text]}
    bank = Bank(base)
    table = base.model.get_input_embeddings().weight.clone()
    text = bank.add(
        PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="TEXT", prompt_tuning_init_text="ab"), seed=0
    )
    assert torch.equal(bank.parameters(text)[TABLE], table[[7, 8, 7]])
    drawn = bank.add(PromptTuningConfig(num_virtual_tokens=50), seed=1)
    found = (bank.parameters(drawn)[TABLE][:, None] == table).all(-1)
    assert found.any(1).all()
    assert found.any(0).sum() > 20
    assert torch.equal(Bank(base).base.model.get_input_embeddings().weight, table)
    normal = bank.add(PromptTuningConfig(num_virtual_tokens=500, prompt_tuning_init="RANDOM"), seed=1)
    assert bank.parameters(normal)[TABLE].std().item() == pytest.approx(1, abs=0.02)
    bank.remove(drawn)
    assert bank.num_virtual(drawn) == 0
    assert bank.add(LoraConfig(rank=2), seed=0) == drawn
    assert bank.num_virtual(drawn) == 0


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="TEXT and prompt_tuning_init_text need each other"):
        PromptTuningConfig(prompt_tuning_init="TEXT")
    with pytest.raises(ValueError, match="modules_to_save: "):
        PromptTuningConfig(modules_to_save=("lm_head",))
    with pytest.raises(ValueError, match="only with prefix_projection"):
        PrefixTuningConfig(encoder_hidden_size=4)
    with pytest.raises(ModelError, match=r"needs model\.attention: packed"):
        Bank(make_base("bloom")).add(PromptTuningConfig(), seed=0)
    with pytest.raises(ModelError, match="one shape, which a prefix needs; use prompt_tuning"):
        Bank(make_base("deepseek_v3", v_head_dim=4)).add(PrefixTuningConfig(), seed=0)
    bank = Bank(make_base("llama"))
    generator = Generator(bank.base, bank)
    generator.notice = "because"
    with pytest.raises(RequestError, match="virtual tokens cannot answer here: because"):
        generator.submit(Prompt(np.array([5]), bank.add(PromptTuningConfig(), seed=0)), GenerationConfig())


def test_exports_say_what_they_cannot_take_in(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "base")
    engine, (slot,) = make_engine(make_base("llama"), PROMPTS["prefix_tuning"])
    settings = ModelConfig(path=str(tmp_path / "base"), device="cpu", dtype="float64")
    source = replace(source_of(tmp_path / "base", on_disk(engine.bank, slot)), tokenizer=object(), model=settings)
    for target in (MergedExportConfig(), LoraGGUFExportConfig()):
        with pytest.raises(ModelError, match="mine: prefix_tuning 5 tokens: its virtual tokens are no weights"):
            target.build().needs(source)
    target = PeftExportConfig().build()
    target.needs(source)
    (tmp_path / "out").mkdir()
    target.write(source, tmp_path / "out", lambda done, total: None)
    assert load_adapter(tmp_path / "out").config == PROMPTS["prefix_tuning"]
    token_L = np.arange(3, 9)
    (reading,) = target.read_back(source, tmp_path / "out")
    with reading.open() as reader:
        exported_LV = reader.logprobs(token_L)
    assert exported_LV.shape == (6, 97)
    ours_L = engine.logprobs(slot, [Segment(token_L, np.r_[0, np.ones(5)].astype(np.float32))])[0]
    np.testing.assert_allclose(exported_LV[np.arange(5), token_L[1:]], ours_L[1:], atol=1e-4)


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    engine, (slot,) = make_engine(make_base("llama"), PROMPTS["prefix_tuning"])
    save_adapter(tmp_path / "a", on_disk(engine.bank, slot), describe_base(engine.base.model, "llama"))
    card = (tmp_path / "a" / "README.md").read_text()
    assert "A `prefix_tuning 5 tokens` adapter" in card
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_virtual_tokens": 7}))
    with pytest.raises(ModelError, match=r"prompt_embeddings: shape \(5, 64\), expected \(7, ...\)"):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize("case", ["prefix_tuning", *(pytest.param(case, marks=slow) for case in PLANNED_TOO)])
def test_a_planned_step_is_a_real_step(case: str, tmp_path: Path) -> None:
    """Virtual tokens and the copies of keys and values are in the plan. Not what torch's fused LSTM keeps beside its
    outputs, which a plan does not see: a few times K x hidden numbers."""
    settings = folder_of("llama", tmp_path)
    jobs = planned(LoraConfig(rank=4), CASES[case].model_copy(update={"num_virtual_tokens": 40}), lengths=[16, 20, 9])
    static, peak = measured(settings, jobs, 4096, "none")
    step = StepMemory(settings, jobs).step(4096, "none")
    assert step.base + step.adapters == pytest.approx(static, rel=0.03)
    assert step.total - step.static == pytest.approx(peak, rel=0.1)

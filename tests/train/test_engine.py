"""The verbs of the engine: cutting, counting, clipping, guarding, evaluating."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import BASE_SLOT, Batch, Scores, Totals
from lowrank.records import Text
from lowrank.segments import CHOSEN, REJECTED, Segment, number_the_step
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.tiny_models import make_base, make_engine, random_step


def segments_of(batches: list[Batch]) -> list[tuple[int, list[int]]]:
    """(slot, tokens) of every segment, in the order in which they will be seen."""
    return [
        (slot, tokens.tolist())
        for batch in batches
        for slot, tokens in zip(batch.slots, batch.token_T.split(batch.lengths))
    ]


@pytest.mark.parametrize("limit", [1, 10, 25, 40, 1000])
def test_cut_keeps_everything_once_in_order_and_within_the_limit(limit: int) -> None:
    engine, slots = make_engine(make_base("llama"), LoraConfig(rank=2), LoraConfig(rank=2), micro_batch_tokens=limit)
    work = {slots[1]: random_step(1, [9, 30, 4]), slots[0]: random_step(0, [5, 12, 8, 3])}
    batches = engine.micro_batches(work)
    expected = [(slot, segment.token_L.tolist()) for slot in slots for segment in work[slot]]
    assert segments_of(batches) == expected
    for batch in batches:
        assert batch.num_tokens <= limit or len(batch.lengths) == 1
    assert all(a.num_tokens + b.lengths[0] > limit for a, b in itertools.pairwise(batches)), "a pass could hold more"


@pytest.mark.parametrize("limit", [1, 15, 30, 1000])
def test_cut_never_tears_a_pair(limit: int) -> None:
    engine, slots = make_engine(make_base("llama"), LoraConfig(rank=2), LoraConfig(rank=2), micro_batch_tokens=limit)
    pairs = [
        replace(segment, pair=index // 2, role=CHOSEN if index % 2 == 0 else REJECTED)
        for index, segment in enumerate(random_step(0, [9, 5, 12, 8, 3, 20]))
    ]
    batches = engine.micro_batches({slots[0]: random_step(3, [6]), slots[1]: pairs})
    assert len(batches) == {1: 4, 15: 4, 30: 3, 1000: 1}[limit]
    for batch in batches:
        members = [pair for pair in batch.pair_S.tolist() if pair >= 0]
        assert all(members.count(pair) == 2 for pair in members)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_cut_is_the_first_that_fits_whatever_the_lengths(layout: Any) -> None:
    """Beside the plain rule, which looks at all lengths again for each segment."""
    base = make_base("bloom" if layout == "padded" else "llama")
    engine, (slot,) = make_engine(base, LoraConfig(rank=2), micro_batch_tokens=64)
    lengths = np.random.default_rng(0).integers(2, 40, 120).tolist()
    expected: list[tuple[int, ...]] = [()]
    for length in lengths:
        if base.padded_tokens((*expected[-1], length)) > 64:
            expected.append(())
        expected[-1] += (length,)
    assert [batch.lengths for batch in engine.micro_batches({slot: random_step(0, lengths)})] == expected


def test_cut_looks_at_each_segment_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of many short rows: 102 ms for 1,024 of them, when each looked at all before it."""
    engine, (slot,) = make_engine(make_base("llama"), LoraConfig(rank=2), micro_batch_tokens=100_000)
    work, looks, length_of = {slot: random_step(0, [3] * 200)}, [], Segment.__len__

    def look(segment: Segment) -> int:
        looks.append(1)
        return length_of(segment)

    monkeypatch.setattr(Segment, "__len__", look)
    assert len(engine.micro_batches(work)) == 1
    assert len(looks) < 20 * 200


def test_micro_batches_count_padding_where_there_is_padding() -> None:
    """One long document makes every row of its pass long."""
    work = {0: random_step(0, [4, 4, 4, 4, 20, 4])}
    packed, _ = make_engine(make_base("llama"), LoraConfig(rank=2), micro_batch_tokens=40)
    padded, _ = make_engine(make_base("bloom"), LoraConfig(rank=2), micro_batch_tokens=40)
    assert [batch.lengths for batch in packed.micro_batches(work)] == [(4, 4, 4, 4, 20, 4)]
    assert [batch.lengths for batch in padded.micro_batches(work)] == [(4, 4, 4, 4), (20, 4)]


@pytest.mark.parametrize("limit", [None, 0.05])
def test_clipping_is_torchs_and_reports_the_norm_before(limit: float | None) -> None:
    outcomes = []
    for own in (True, False):
        engine, (slot,) = make_engine(make_base("llama"), LoraConfig(rank=4), type="sgd", max_grad_norm=limit)
        parameters = engine.bank.parameters(slot)
        start = [value.detach().clone() for value in parameters.values()]
        engine.forward_backward({slot: random_step(0, [9, 14])})
        if own:
            norm = engine.optim_step(slot, 1.0).grad_norm
        else:
            norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), limit or float("inf")))
            torch.optim.SGD(parameters.values(), lr=1.0).step()
        outcomes.append((norm, [value.detach() - before for value, before in zip(parameters.values(), start)]))
    (norm, ours), (expected_norm, theirs) = outcomes
    assert norm == pytest.approx(expected_norm, rel=1e-12)
    assert norm > 0.05
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    engine, slots = make_engine(make_base("llama"), LoraConfig(rank=4), LoraConfig(rank=4))
    work = {slot: random_step(slot, [9, 14]) for slot in slots}
    engine.forward_backward(work)
    for slot in slots:
        engine.optim_step(slot, 1e-2)
    job = engine.jobs[slots[0]]
    before = [value.detach().clone() for value in job.parameters.values()]
    state = copy.deepcopy(job.optimizer.state_dict()["state"])
    engine.forward_backward(work)
    gradient = next(iter(job.parameters.values())).grad
    assert gradient is not None
    gradient.view(-1)[3] = bad
    assert engine.optim_step(slots[0], 1e-2).skipped
    assert not engine.optim_step(slots[1], 1e-2).skipped
    assert job.step == 2, "a skipped step counts: its data are used up"
    assert all(torch.equal(one, other) for one, other in zip(job.parameters.values(), before))
    assert all(parameter.grad is None for parameter in job.parameters.values())
    for key, entry in job.optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, state[key][name])
    engine.forward_backward(work)
    assert not engine.optim_step(slots[0], 1e-2).skipped


class BrokenSum:
    """A third party's objective whose loss is infinite and whose gradient is not."""

    record = Text

    def count(self, batch: Batch) -> Totals:
        return {"tokens": float(batch.weight_T.sum())}

    def loss(self, scores: Scores, batch: Batch, totals: Totals) -> tuple[torch.Tensor, dict[str, Any]]:
        return -(batch.weight_T * scores.logprob_T).sum() / totals["tokens"] + float("inf"), {}


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is() -> None:
    engine, slots = make_engine(make_base("llama"), LoraConfig(rank=4), LoraConfig(rank=4))
    engine.add(slots[0], BrokenSum(), AdamWConfig(), seed=0, neftune_alpha=0.0)
    work = {slot: random_step(slot, [9, 14]) for slot in slots}
    forwarded = engine.forward_backward(work)
    assert not np.isfinite(forwarded[slots[0]].loss)
    updates = [engine.optim_step(slot, 1e-2) for slot in slots]
    assert [update.skipped for update in updates] == [True, False]
    assert np.isfinite(updates[0].grad_norm)


def test_evaluation_leaves_no_trace() -> None:
    """Between the gradients and the update: neither, nor optimizer, counters or torch's random numbers."""
    outcomes = []
    for evaluated in (False, True):
        engine, slots = make_engine(make_base("llama"), LoraConfig(rank=4, dropout=0.3), LoraConfig(rank=2))
        for step in range(3):
            engine.forward_backward({slot: random_step(10 * step + slot, [9, 14]) for slot in slots})
            if evaluated:
                random_state = torch.get_rng_state()
                held_out = {slot: random_step(7, [30, 4]) for slot in slots}
                first, second = engine.evaluate(held_out), engine.evaluate(held_out)
                assert first == second
                assert torch.equal(torch.get_rng_state(), random_state)
            for slot in slots:
                engine.optim_step(slot, 1e-2)
        assert [engine.jobs[slot].step for slot in slots] == [3, 3]
        outcomes.append([value for slot in slots for value in engine.bank.parameters(slot).values()])
    for one, other in zip(*outcomes):
        assert torch.equal(one, other)


def test_evaluation_keeps_no_graph() -> None:
    engine, (slot,) = make_engine(make_base("llama"), LoraConfig(rank=4))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(1) or tensor, lambda tensor: tensor):
        engine.evaluate({slot: random_step(7, [30, 4])})
    assert not kept


def test_held_out_loss_does_not_depend_on_company_or_cutting() -> None:
    work = random_step(5, [30, 4, 11])
    engine, (slot, other) = make_engine(make_base("llama"), LoraConfig(rank=4), LoraConfig(rank=2))
    for each in (slot, other):
        for parameter in engine.bank.parameters(each).values():
            parameter.data += 0.05
    alone = engine.evaluate({slot: work})[slot]
    together = engine.evaluate({slot: work, other: random_step(6, [50])})[slot]
    engine.micro_batch_tokens = 12
    cut = engine.evaluate({slot: work})[slot]
    assert alone.loss == pytest.approx(together.loss, abs=1e-12)
    assert alone.loss == pytest.approx(cut.loss, abs=1e-12)
    assert alone.totals == together.totals == cut.totals == {"tokens": sum(float(s.weight_L.sum()) for s in work)}
    assert alone.tokens == 45


def test_the_bare_base_beside_jobs() -> None:
    """A job on the bare base (slot -1) sees no adapter."""
    engine, (slot,) = make_engine(make_base("llama"), LoraConfig(rank=4))
    engine.jobs[BASE_SLOT] = engine.jobs[slot]  # whatever its optimizer is, evaluation does not ask
    work = random_step(5, [30, 4])
    fresh = engine.evaluate({BASE_SLOT: work, slot: work})
    assert fresh[slot].loss == pytest.approx(fresh[BASE_SLOT].loss, abs=1e-13)
    for parameter in engine.bank.parameters(slot).values():
        parameter.data += 0.1
    moved = engine.evaluate({BASE_SLOT: work, slot: work})
    assert moved[BASE_SLOT].loss == pytest.approx(fresh[BASE_SLOT].loss, abs=1e-13)
    assert abs(moved[slot].loss - fresh[slot].loss) > 1e-3


def test_draws_go_on_where_a_resumed_job_stands() -> None:
    """Dropout and noise are functions of the step's number: setting it is all there is to restore."""
    whole, (slot,) = make_engine(make_base("llama"), LoraConfig(rank=4, dropout=0.3))
    parts: list[Engine] = []
    for _ in range(2):
        engine, _ = make_engine(make_base("llama"), LoraConfig(rank=4, dropout=0.3))
        parts.append(engine)
    work = [{slot: random_step(step, [9, 14])} for step in range(4)]
    losses = []
    for step in range(4):
        losses.append(whole.forward_backward(work[step])[slot].loss)
        whole.optim_step(slot, 1e-2)
    for step in range(2):
        parts[0].forward_backward(work[step])
        parts[0].optim_step(slot, 1e-2)
    first, second = parts
    second.bank.load(slot, {name: value.detach() for name, value in first.bank.parameters(slot).items()})
    second.jobs[slot].optimizer.load_state_dict(first.jobs[slot].optimizer.state_dict())
    assert second.forward_backward(work[2])[slot].loss != losses[2], "step 0's draws are others"
    second.jobs[slot].optimizer.zero_grad()
    second.jobs[slot].step = 2
    again = []
    for step in (2, 3):
        again.append(second.forward_backward(work[step])[slot].loss)
        second.optim_step(slot, 1e-2)
    assert again == losses[2:]


def test_gradients_of_two_calls_add_up() -> None:
    """forward_backward accumulates until optim_step."""
    engine, (slot,) = make_engine(make_base("llama"), LoraConfig(rank=4))
    engine.forward_backward({slot: random_step(0, [9])})
    once = [value.grad.clone() for value in engine.bank.parameters(slot).values() if value.grad is not None]
    engine.forward_backward({slot: random_step(0, [9])})
    for value, single in zip(engine.bank.parameters(slot).values(), once):
        torch.testing.assert_close(value.grad, 2 * single)


def test_a_removed_job_leaves_its_adapter() -> None:
    engine, (slot,) = make_engine(make_base("llama"), LoraConfig(rank=4))
    engine.remove(slot)
    assert engine.bank.parameters(slot)
    with pytest.raises(KeyError):
        engine.forward_backward({slot: random_step(0, [9])})


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.08), (torch.float16, 0.02)])
@pytest.mark.parametrize("num_documents", [2, 300])
def test_gradients_in_half_precision(dtype: torch.dtype, bound: float, num_documents: int) -> None:
    """Against double precision, also for a step of thousands of tokens, where each one's share is tiny."""
    outcomes = []
    for each in (torch.float64, dtype):
        base = make_base("llama", each, initializer_range=0.1)
        engine, (slot,) = make_engine(base, LoraConfig(rank=4))
        with torch.no_grad():
            for index, parameter in enumerate(engine.bank.parameters(slot).values()):
                generator = torch.Generator().manual_seed(index)
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        engine.bank.refresh(slot)
        lengths = [20 + index % 7 for index in range(num_documents)]
        engine.forward_backward({slot: number_the_step(_repeatable(lengths))})
        scale = engine.jobs[slot].scale
        assert (scale is None) is (each != torch.float16)
        divisor = 1.0 if scale is None else scale.value
        outcomes.append([value.grad.double() / divisor for value in engine.bank.parameters(slot).values()])
    for ours, exact in zip(outcomes[1], outcomes[0]):
        assert (ours - exact).norm() < bound * exact.norm()


def _repeatable(lengths: list[int]) -> list[Segment]:
    """The same few documents over and over: the gradient does not shrink with their number."""
    return [random_step(length, [length])[0] for length in lengths]

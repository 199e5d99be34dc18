"""Is what was written the model that was trained? Every target is asked the same documents as base + adapter.

Compared are the next-token distributions at every place where an answer of a held-out document goes on, the perplexity
of those answers, and greedy answers to the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lowrank.batches import BASE_SLOT
from lowrank.export import ExportReader, ReadBack, Tolerance
from lowrank.export.verify.held_out import HeldOut
from lowrank.export.verify.readers import BankReader

STORE_BYTES = 512 << 20
"""Memory for the distributions of base + adapter, which all targets are compared with."""
_MOST_PLACES = 4096
_NEW_TOKENS = 32
STANDARD_ERRORS_ALLOWED = 3

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class ReferenceLogprobs:
    """What base + adapter says: the side that every target is compared with."""

    held_out: HeldOut
    logprobs: tuple[np.ndarray, ...]
    """(places compared, V) float32 of each document."""
    greedy: tuple[tuple[int, ...], ...]
    losses: tuple[np.ndarray, ...]
    """Nats of each compared token that another follows, by document."""
    base_loss: float | None
    """Of the base without its adapter; None if there is no adapter."""

    @property
    def loss(self) -> float:
        """Nats per compared token."""
        return float(np.concatenate(self.losses).mean())


@dataclass(frozen=True)
class Comparison:
    """How far one thing that was written is from base + adapter."""

    name: str
    tokens: int
    mean_kl: float
    """Nats: KL(base + adapter || this), over the compared places."""
    worst_kl: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    perplexity_error: float
    """Standard error of `perplexity / reference_perplexity - 1` over the compared tokens: few of them say little."""
    base_perplexity: float | None
    greedy_same: int
    greedy_prompts: int
    gain_kept: float | None
    """Of what training gained in held-out loss over the bare base: the share that is left. None: nothing was gained."""
    tolerance: Tolerance
    against: str | None
    """The name of what it was rounded from, which it is compared with too; None where nothing lies between."""
    against_mean_kl: float | None
    against_top1_agreement: float | None
    problems: tuple[str, ...]
    """Which tolerances are exceeded, in words; empty: it is the model that was trained."""

    @property
    def passed(self) -> bool:
        """Within all tolerances."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """For export.json."""
        return asdict(self) | {"passed": self.passed, "problems": list(self.problems)}


def places_for(held_out: HeldOut, vocabulary: int) -> HeldOut:
    """As many compared places as STORE_BYTES holds, from every document the same number at most."""
    most = min(_MOST_PLACES, max(16, STORE_BYTES // (4 * max(1, vocabulary))))
    each = max(1, most // max(1, len(held_out.documents)))
    cut, compared = [], []
    for document, chosen in zip(held_out.documents, held_out.compared):
        places = np.flatnonzero(chosen)[:each]
        last = int(places[-1]) if len(places) else len(document)
        end = min(len(document), last + 2)  # the token after the last place is its target
        mask = np.zeros(end, bool)
        mask[places] = True
        cut.append(document[:end])
        compared.append(mask)
    return replace(held_out, documents=tuple(cut), compared=tuple(compared))


def reference_answers(
    reader: BankReader, held_out: HeldOut, stop_tokens: frozenset[int], vocabulary: int, tick: Tick
) -> ReferenceLogprobs:
    """Ask base + adapter, and the bare base for its loss. Questions without an answer are compared on its own."""
    total = len(held_out.prompts) + len(held_out.documents)
    answered = reader.greedy(held_out.prompts, _NEW_TOKENS, stop_tokens, lambda done: tick(done, total))
    greedy = [tuple(answer) for answer in answered]
    if not any(chosen.any() for chosen in held_out.compared):
        held_out = _answered(held_out, greedy)
    held_out = places_for(held_out, vocabulary)
    has_adapter = reader.slot != BASE_SLOT
    logprobs, losses, base_losses = [], [], []
    for number, (document, compared) in enumerate(zip(held_out.documents, held_out.compared)):
        logprobs.append(reader.logprobs(document, _prompt(compared))[compared])
        losses.append(_losses(logprobs[-1], document, compared))
        if has_adapter:
            alone = BankReader(reader.base, reader.bank).logprobs(document, _prompt(compared))[compared]
            base_losses.append(_losses(alone, document, compared))
        tick(len(held_out.prompts) + number + 1, total)
    base_loss = float(np.concatenate(base_losses).mean()) if has_adapter else None
    return ReferenceLogprobs(held_out, tuple(logprobs), tuple(greedy), tuple(losses), base_loss)


class Comparer:
    """Holds what was written against what base + adapter said."""

    def __init__(self, answers: ReferenceLogprobs, stop_tokens: frozenset[int]) -> None:
        self.answers = answers
        self.stop_tokens = stop_tokens
        self._between: tuple[str, list[np.ndarray]] | None = None

    def prepare(self, read_back: ReadBack) -> None:
        """Before it is opened: ask what it was rounded from, so that the two are never in memory together."""
        if read_back.against is not None:
            self._logprobs(read_back.against)

    def compare(self, read_back: ReadBack, reader: ExportReader, tick: Tick) -> Comparison:
        """Ask what was opened the same, and see whether it is within its tolerance."""
        between = None if read_back.against is None else self._logprobs(read_back.against)
        return _compare(read_back, reader, self.answers, between, self.stop_tokens, tick)

    def _logprobs(self, read_back: ReadBack) -> list[np.ndarray]:
        """At the compared places of each document, kept for what else was rounded from it."""
        if self._between is None or self._between[0] != read_back.name:
            requested = self.answers.held_out
            with read_back.open() as reader:
                self._between = (
                    read_back.name,
                    [
                        reader.logprobs(document, _prompt(places))[places]
                        for document, places in zip(requested.documents, requested.compared)
                    ],
                )
        return self._between[1]


def _compare(
    read_back: ReadBack,
    reader: ExportReader,
    answers: ReferenceLogprobs,
    between: Sequence[np.ndarray] | None,
    stop_tokens: frozenset[int],
    tick: Tick,
) -> Comparison:
    requested = answers.held_out
    total = len(requested.prompts) + len(requested.documents)
    answered = reader.greedy(requested.prompts, _NEW_TOKENS, stop_tokens, lambda done: tick(done, total))
    same = sum(tuple(answer) == expected for answer, expected in zip(answered, answers.greedy, strict=True))
    kls, agreed, losses = [], [], []
    between_kls, between_agreed = [], []
    for number, (document, compared) in enumerate(zip(requested.documents, requested.compared)):
        own = reader.logprobs(document, _prompt(compared))[compared]
        reference = answers.logprobs[number]
        kls.append(kl_of(reference, own))
        agreed.append(reference.argmax(1) == own.argmax(1))
        losses.append(_losses(own, document, compared))
        if between is not None:
            between_kls.append(kl_of(between[number], own))
            between_agreed.append(between[number].argmax(1) == own.argmax(1))
        tick(len(requested.prompts) + number + 1, total)
    loss_N, reference_N = np.concatenate(losses), np.concatenate(answers.losses)
    return build_comparison(
        read_back,
        kl_K=np.concatenate(kls),
        same_K=np.concatenate(agreed),
        loss_N=loss_N,
        reference_N=reference_N,
        base_loss=answers.base_loss,
        greedy=(same, len(requested.prompts)),
        gain_kept=_gain_kept(answers, float(loss_N.mean())),
        between=(np.concatenate(between_kls), np.concatenate(between_agreed)) if between is not None else None,
    )


def build_comparison(
    read_back: ReadBack,
    *,
    kl_K: np.ndarray,
    same_K: np.ndarray,
    loss_N: np.ndarray,
    reference_N: np.ndarray,
    base_loss: float | None,
    greedy: tuple[int, int],
    gain_kept: float | None = None,
    between: tuple[np.ndarray, np.ndarray] | None = None,
) -> Comparison:
    """Builds the comparison from what was measured at K positions, N of which a known token follows.

    kl_K, same_K         nats from base + adapter; whether the likeliest next token is the same
    loss_N, reference_N  nats of the tokens that follow: of what was written, and of base + adapter
    base_loss            the mean of the bare base
    greedy               prompts whose greedy answer is the same, and how many there are
    between              kl_K and same_K from what it was rounded from
    """
    shift_N = loss_N - reference_N
    found = Comparison(
        name=read_back.name,
        tokens=len(kl_K),
        mean_kl=float(kl_K.mean()),
        worst_kl=float(kl_K.max()),
        top1_agreement=float(same_K.mean()),
        perplexity=_perplexity(float(loss_N.mean())),
        reference_perplexity=_perplexity(float(reference_N.mean())),
        perplexity_error=float(shift_N.std(ddof=1) / len(shift_N) ** 0.5) if len(shift_N) > 1 else 0.0,
        base_perplexity=None if base_loss is None else _perplexity(base_loss),
        greedy_same=greedy[0],
        greedy_prompts=greedy[1],
        gain_kept=gain_kept,
        tolerance=read_back.tolerance,
        against=None if read_back.against is None else read_back.against.name,
        against_mean_kl=None if between is None else float(between[0].mean()),
        against_top1_agreement=None if between is None else float(between[1].mean()),
        problems=(),
    )
    return replace(found, problems=_problems(found))


def _problems(found: Comparison) -> tuple[str, ...]:
    """The tolerances that it exceeds, in words."""
    allowed = found.tolerance
    relative = abs(found.perplexity / found.reference_perplexity - 1)
    # Rounding moves the losses of unlikely tokens by more: above 1 nat what may differ is a share of the loss.
    most = allowed.perplexity * max(1.0, float(np.log(found.reference_perplexity)))
    problems = []
    if not found.mean_kl <= allowed.mean_kl:  # not <=: NaN is a problem too
        problems.append(f"mean KL is {found.mean_kl:.2g}, at most {allowed.mean_kl:.2g} is expected")
    least = allowed.top1_agreement
    # Two tokens that are nearly as likely change places by rounding: in how many of few places is a matter of chance.
    if not found.top1_agreement >= least - STANDARD_ERRORS_ALLOWED * (least * (1 - least) / found.tokens) ** 0.5:
        problems.append(
            f"the likeliest next token is the same in {found.top1_agreement:.1%} of {found.tokens} places, "
            f"at least {least:.1%} is expected"
        )
    # A type that rounds moves each token's loss either way: over few tokens their mean is off by chance.
    if not relative - STANDARD_ERRORS_ALLOWED * found.perplexity_error <= most:
        problems.append(f"the perplexity differs by {relative:.2%}, at most {most:.2%} is expected")
    if allowed.gain_lost is not None and found.gain_kept is not None and not found.gain_kept >= 1 - allowed.gain_lost:
        before, after = np.log(found.reference_perplexity), np.log(found.perplexity)
        problems.append(
            f"{1 - found.gain_kept:.1%} of what training gained is lost (loss {before:.4f}, now {after:.4f}), at most "
            f"{allowed.gain_lost:.0%} is expected"
        )
    if found.against_mean_kl is not None and not found.against_mean_kl <= allowed.mean_kl:
        problems.append(
            f"mean KL from {found.against} is {found.against_mean_kl:.2g}, at most {allowed.mean_kl:.2g} is expected"
        )
    if problems and allowed.remedy:
        problems.append(allowed.remedy)
    return tuple(problems)


def _answered(held_out: HeldOut, greedy: Sequence[tuple[int, ...]]) -> HeldOut:
    """Questions with base + adapter's own answers, which both sides then read."""
    documents, compared = [], []
    for prompt, answer in zip(held_out.prompts, greedy):
        document = np.append(prompt, np.asarray(answer, np.int64))
        mask = np.zeros(len(document), bool)
        begin = len(prompt) - 1 if answer else 0  # an answer that ends at once says nothing; the question itself does
        mask[begin : max(len(prompt), len(document) - 1)] = True
        documents.append(document)
        compared.append(mask)
    return replace(held_out, documents=tuple(documents), compared=tuple(compared))


def kl_of(reference_KV: np.ndarray, own_KV: np.ndarray) -> np.ndarray:
    """(K) nats. A head that was padded is compared on the columns that both have."""
    width = min(reference_KV.shape[1], own_KV.shape[1])
    kl_K = np.empty(len(reference_KV))
    for row, (reference_V, own_V) in enumerate(zip(reference_KV, own_KV)):  # float64 of one row at a time
        p, q = reference_V[:width].astype(np.float64), own_V[:width].astype(np.float64)
        p, q = p - _logsumexp(p), q - _logsumexp(q)
        kl_K[row] = max(0.0, float((np.exp(p) * (p - q))[np.isfinite(p)].sum()))
    return kl_K


def _logsumexp(values: np.ndarray) -> float:
    top = values.max()
    return float(top + np.log(np.exp(values - top).sum()))


def _prompt(compared: np.ndarray) -> int:
    """How many tokens ask in a document that is compared at these places, each before a token of an answer."""
    return int(compared.argmax()) + 1


def _losses(logprob_KV: np.ndarray, document: np.ndarray, compared: np.ndarray) -> np.ndarray:
    """Minus the log-probability of the token that follows each compared place; the very last has none."""
    places = np.flatnonzero(compared)
    known = places + 1 < len(document)
    rows = np.flatnonzero(known)
    return -logprob_KV[rows, document[places[known] + 1]].astype(np.float64)


def _perplexity(loss: float) -> float:
    return float(np.exp(min(loss, 700.0)))


def _gain_kept(answers: ReferenceLogprobs, loss: float) -> float | None:
    if answers.base_loss is None or answers.base_loss - answers.loss < 1e-3:
        return None
    return (answers.base_loss - loss) / (answers.base_loss - answers.loss)

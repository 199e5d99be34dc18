"""The test every base passes before it is trained: documents must not see one another.

It runs the loaded model itself, a few dozen tokens, no gradient. Packed documents must give what each
gives alone, and changing one document must not move another. A family that fails is run padded; one
that fails padded too is refused. So a model nobody has tried is right, slower, or refused, never wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from lowrank.errors import ModelError
from lowrank.models.attention import BoundariesMissing
from lowrank.models.base import Base
from lowrank.models.shared_prompts import tail_of
from lowrank.records import Segment, pack

_LENGTHS = (7, 12, 5)
_NARROW = 4


def check_head(base: Base) -> None:
    """Our hidden states times our head must be the model's own logits."""
    token_1T = random_documents(base, 0)[1][None].to(base.device)
    with torch.no_grad(), base.using_attention(base.own_attention):
        own_TV = base.model(input_ids=token_1T, use_cache=False).logits[0]
        ours_TV = base.head().logits(base._call(token_1T, position_ids=_places(token_1T))[0])
    error = distance(ours_TV, own_TV)
    if error > tolerance(base):
        raise ModelError(
            f"{base.name}: the model does something to its logits that lowrank does not know "
            f"(relative difference {error:.1e}). Please report the model's type, {base.model.config.model_type!r}."
        )


def choose_layout(base: Base, wanted: str) -> str | None:
    """Settle `base` on a layout that keeps documents apart; the sentence to tell the user, or None.

    `wanted` is the setting: auto, packed or padded. Raises ModelError if nothing holds.
    """
    reason = None
    if wanted in ("auto", "packed"):
        base.settle("packed")
        reason = _what_leaks(base)
        if reason is None:
            return None
        if wanted == "packed":
            raise ModelError(f"{base.name} cannot run packed: {reason}. Set model.attention to auto or padded.")
    base.settle("padded")
    padded_reason = _what_leaks(base)
    if padded_reason is not None:
        raise ModelError(
            f"{base.name} ({base.model.config.model_type}) cannot be trained: "
            f"packed, {reason}; padded, {padded_reason}."
        )
    if reason is None:
        return None
    return f"this model runs one document per padded row, which is slower: packed, {reason}"


def _what_leaks(base: Base) -> str | None:
    """None if all is well, else what happened, in words."""
    first, other = random_documents(base, 0), random_documents(base, 1)
    try:
        with narrow_windows(base.model):
            with one_token_at_a_time(base):
                together = _hidden(base, first)
                moved = _hidden(base, [other[0], first[1], first[2]])
            alone = [hidden_alone(base, document) for document in first]
    except BoundariesMissing:
        return "its attention does not receive the document boundaries"
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError) as error:
        return f"it does not run so ({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''})"
    ends = torch.tensor(_LENGTHS).cumsum(0).tolist()
    # Same shapes, same rows: the kernels must give the same bits, so the smallest leak shows in every dtype.
    if not torch.equal(moved[ends[0] :], together[ends[0] :]):
        return f"one document changes another (by {distance(moved[ends[0] :], together[ends[0] :]):.1e})"
    apart = max(distance(together[b - len(t) : b], t) for b, t in zip(ends, alone))
    if not apart <= tolerance(base):
        return f"a document gives another result than alone (by {apart:.1e})"
    return None


def shares_prompts(base: Base) -> bool:
    """Whether two answers to one prompt give the same after one computation of it, and do not see one another."""
    if base.layout != "packed":
        return False
    prompt, *answers = (document.numpy() for document in random_documents(base, 0))
    other = random_documents(base, 1)[1].numpy()

    def hidden(answers: list[np.ndarray], share: bool) -> torch.Tensor:
        segments = [Segment(np.concatenate([prompt, each]), _learned(len(prompt), len(each)), 0) for each in answers]
        given = [segments[0], tail_of(segments[1], segments[0]) if share else segments[1]]
        with torch.no_grad():
            return base.hidden(pack([(-1, each) for each in given]).to(base.device)).double()

    try:
        with narrow_windows(base.model), one_token_at_a_time(base):
            shared, moved, apart = hidden(answers, True), hidden([other, answers[1]], True), hidden(answers, False)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError, IndexError):
        return False
    first, last = len(prompt) + len(answers[0]), len(answers[1]) + 1
    same = torch.cat([apart[:first], apart[-last:]])
    return torch.equal(shared[-last:], moved[-last:]) and distance(shared, same) <= tolerance(base)


def _learned(prompt: int, answer: int) -> np.ndarray:
    return np.concatenate([np.zeros(prompt), np.ones(answer)]).astype(np.float32)


@contextlib.contextmanager
def narrow_windows(model: Any) -> Iterator[None]:
    """Sliding windows and chunks of attention become 4 tokens wide, so that a dozen tokens show what thousands would.

    Some families build them into the mask alone, which the packed attention never sees.
    """
    owners = {id(owner): owner for module in model.modules() for owner in (module, getattr(module, "config", None))}
    before = [
        (owner, name, value)
        for owner in owners.values()
        for name in ("sliding_window", "attention_chunk_size")
        if type(value := getattr(owner, name, None)) is int and value > _NARROW
    ]
    for owner, name, _ in before:
        setattr(owner, name, _NARROW)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextlib.contextmanager
def one_token_at_a_time(base: Base) -> Iterator[None]:
    """Experts see other shapes when another document is routed otherwise, hence other rounding; not in this mode."""
    config = base.model.config
    before = getattr(config, "_experts_implementation", None)
    if before is not None:
        config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        if before is not None:
            config._experts_implementation = before


def random_documents(base: Base, seed: int) -> list[torch.Tensor]:
    """Three short ones, of 7, 12 and 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    return [torch.randint(0, vocabulary, (length,), generator=generator) for length in _LENGTHS]


def _places(token_1T: torch.Tensor) -> torch.Tensor:
    return torch.arange(token_1T.shape[1], device=token_1T.device)[None]


def _hidden(base: Base, documents: list[torch.Tensor]) -> torch.Tensor:
    segments = [Segment(document.numpy(), torch.zeros(len(document)).numpy()) for document in documents]
    with torch.no_grad():
        return base.hidden(pack([(-1, segment) for segment in segments]).to(base.device)).double()


def hidden_alone(base: Base, document: torch.Tensor) -> torch.Tensor:
    """What the model makes of one document, with its own attention, (T, D). Where layers see only some tokens it is
    packed as in training: nothing else chooses them."""
    if base.depths is not None:
        return _hidden(base, [document])
    token_1T = document[None].to(base.device)
    with torch.no_grad(), base.using_attention(base.own_attention):
        return base._call(token_1T, position_ids=_places(token_1T))[0].double()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative distance; NaN anywhere counts as far."""
    value = ((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-12)).item()
    return value if value == value else float("inf")


def tolerance(base: Base) -> float:
    """Rounding of a whole network in the base's dtype; some families compute parts in float32 whatever it is."""
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(base.dtype, 6e-2)

"""The isolation check every base passes before it is trained: documents must not see one another.

It runs the loaded model itself, a few dozen tokens, no gradient. Packed documents must give what each
gives alone, and changing one document must not move another. A family that fails is run padded; one
that fails padded too is refused. So a model nobody has tried is right, slower, or refused, never wrong.

A prefix language model (PaliGemma, HRM-Text) reads the prompt of a document both ways and what follows from left to
right. That a model is one, it is asked too. The prompt of a document are the tokens before the first that is learned
(`Segment.prompt`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch

from lowrank.batches import pack
from lowrank.errors import ModelError
from lowrank.kernels.accelerators import wide
from lowrank.models.attention.packed import BoundariesMissing
from lowrank.models.attention.prefix_sharing import tail_of
from lowrank.models.base import Base
from lowrank.models.layers import causal_lms
from lowrank.models.logit_transforms import logit_transforms
from lowrank.models.native_masks import possible_prompt_types
from lowrank.segments import Segment

_LENGTHS = (7, 12, 5)
_PROMPTS = (3, 8, 5)
"""How many of their first tokens ask, of documents for a prefix language model: one is a question alone."""
_NARROW = 4


MODEL_ERRORS = ValueError, TypeError, LookupError, NotImplementedError, RuntimeError, ImportError, AttributeError
"""What a model's own code raises where it meets what it was not made for."""
LIKE_THE_FIRST_CHATGLM = (
    "so it is with the code of ChatGLM's first generations, which lowrank does not run: take a model in transformers' "
    "own form, as GLM-4's -hf files and all later ones of that family are"
)
_TWO_WAYS = (
    "a prefix language model: what comes before the first token that is learned is the prompt and read both ways, the "
    "rest from left to right; of a conversation whose answers are all learned, that is what comes before the first"
)


def check_head(base: Base) -> None:
    """Our hidden states times our head must be the model's own logits. Which of the factors that its configuration
    names it computes with (some composite models leave their language model's out), the model itself says."""
    token_1T = random_documents(base, 0)[1][None].to(base.device)
    kind, error = base.model.config.model_type, float("inf")
    with torch.no_grad(), base.using_attention(base.own_attention):
        own_TV = _own_logits(base, token_1T)
        hidden_1TD = base.call(token_1T, position_ids=_places(token_1T))
        if hidden_1TD.shape[:2] != token_1T.shape:
            raise ModelError(
                f"{base.name}: hidden states of one document of {token_1T.shape[1]} tokens come as "
                f"{tuple(hidden_1TD.shape)}, not as (documents, tokens, width); {LIKE_THE_FIRST_CHATGLM}"
            )
        with base.placement.head():
            for multiplier, softcap in logit_transforms(base.model.config):
                base.multiplier, base.softcap = multiplier, softcap
                error = min(error, distance(base.head().logits(hidden_1TD[0]), own_TV))
                if error <= tolerance(base):
                    return
    raise ModelError(
        f"{base.name}: models of type {kind!r} do more to their logits than one matrix, a factor and a soft cap, which "
        f"is what lowrank's loss computes (relative difference {error:.1e}); it cannot be trained or asked here: take "
        "a base whose head is one matrix, as nearly all decoders have"
    )


def _own_logits(base: Base, token_1T: torch.Tensor) -> torch.Tensor:
    """(T, V) of the model, or its largest part that has an LM head and runs; `base.causal_lm` is set to it."""
    raised: Exception | None = None
    for causal_lm in causal_lms(base.model):
        try:
            own_TV = causal_lm(input_ids=token_1T, use_cache=False).logits[0]
            base.causal_lm = causal_lm
            return own_TV
        except MODEL_ERRORS as error:
            raised = raised or error
    what = f"{type(raised).__name__}: {str(raised).splitlines()[0][:200] if str(raised) else ''}"
    raise ModelError(
        f"{base.name}: models of type {base.model.config.model_type!r} do not run on text alone, which is what lowrank "
        f"trains and asks ({what})"
    ) from raised


def choose_layout(base: Base, wanted: str) -> str | None:
    """Settle `base` on a layout that keeps documents apart; the sentence to tell the user, or None.

    `wanted` is the setting: auto, packed or padded. Raises ModelError if nothing holds.
    """
    base.prompt_type = _prompt_type(base)
    slower = _choose_layout(base, wanted)
    described = None if base.prompt_type is None else _TWO_WAYS
    return ". ".join(filter(None, (described, slower))) or None


def _choose_layout(base: Base, wanted: str) -> str | None:
    """`choose_layout`, and the sentence about the layout."""
    reason = None
    if wanted in ("auto", "packed"):
        base.set_layout("packed")
        reason = _what_leaks(base)
        if reason is None:
            return None
        if wanted == "packed":
            raise ModelError(f"{base.name} cannot run packed: {reason}. Set model.attention to auto or padded.")
    base.set_layout("padded")
    padded_reason = _what_leaks(base)
    if padded_reason is not None:
        ahead = ""
        if base.prompt_type is None and _attends_ahead(base):
            ahead = (
                " Alone too its own attention lets a text's tokens see those after them, and it cannot be told where a "
                "prompt ends (an encoder, or a prefix language model that takes no token_type_ids); lowrank trains "
                "models that read left to right, prompts apart."
            )
        raise ModelError(
            f"{base.name} ({base.model.config.model_type}) cannot be trained: "
            f"packed, {reason}; padded, {padded_reason}.{ahead}"
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
                together = _hidden(base, first, _PROMPTS)
                moved = _hidden(base, [other[0], first[1], first[2]], _PROMPTS)
            alone = [hidden_alone(base, document, prompt) for document, prompt in zip(first, _PROMPTS)]
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


def _prompt_type(base: Base) -> int | None:
    """The `token_type_ids` of a prompt's tokens, where the model's own attention reads prompts both ways and the rest
    from left to right; None: it is no prefix language model."""
    if not base.takes_types:
        return None
    for kind in possible_prompt_types(base.backbone):
        base.prompt_type = kind
        with contextlib.suppress(*MODEL_ERRORS), one_token_at_a_time(base):
            if _reads_prompts_both_ways(base):
                return kind
    return None


def _reads_prompts_both_ways(base: Base) -> bool:
    """Whether in a text with a prompt another last token of the prompt changes what the model makes of all before it,
    and another token behind it nothing before that one."""
    document_L = random_documents(base, 0)[1]
    prompt, last = len(document_L) // 2, len(document_L) - 1
    before_LD = hidden_alone(base, document_L, prompt)

    def moved(place: int) -> torch.Tensor:
        """(L) bool: what another token at `place` changes; the same shapes give the same bits."""
        other_L = document_L.clone()
        other_L[place] = (other_L[place] + 1) % base.model.get_input_embeddings().weight.shape[0]
        return (hidden_alone(base, other_L, prompt) != before_LD).any(-1)

    seen_both_ways = bool(moved(prompt - 1)[:prompt].all())
    return seen_both_ways and not any(moved(place)[:place].any() for place in (prompt, last))


def _attends_ahead(base: Base) -> bool:
    """Whether another last token changes what the model makes of the first ones, alone and with its own attention."""
    document = random_documents(base, 0)[1]
    other = torch.cat([document[:-1], (document[-1:] + 1) % base.model.get_input_embeddings().weight.shape[0]])
    return distance(hidden_alone(base, other)[:-1], hidden_alone(base, document)[:-1]) > tolerance(base)


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
            return wide(base.hidden(pack([(-1, each) for each in given]).to(base.device)))

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
def narrow_windows(model: Any) -> Generator[None, None, None]:
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
def one_token_at_a_time(base: Base) -> Generator[None, None, None]:
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


def _hidden(base: Base, documents: Sequence[torch.Tensor], prompts: Sequence[int | None]) -> torch.Tensor:
    segments = [
        Segment(document.numpy(), torch.zeros(len(document)).numpy(), prompt=prompt)
        for document, prompt in zip(documents, prompts)
    ]
    with torch.no_grad():
        return wide(base.hidden(pack([(-1, segment) for segment in segments]).to(base.device)))


def hidden_alone(base: Base, document: torch.Tensor, prompt: int | None = None) -> torch.Tensor:
    """What the model makes of one document, with its own attention, (T, D). Where layers are wrapped it is
    packed as in training: they know nothing else. `prompt`: how many of its first tokens ask; None: all."""
    if base.layer_wrapper is not None:
        return _hidden(base, [document], [prompt])
    token_1T = document[None].to(base.device)
    types = base.types_of_prompts([len(document) if prompt is None else prompt], token_1T)
    with torch.no_grad(), base.using_attention(base.own_attention):
        return wide(base.call(token_1T, position_ids=_places(token_1T), **types)[0])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative distance; NaN anywhere counts as far."""
    value = ((wide(one) - wide(other)).norm() / wide(other).norm().clamp_min(1e-12)).item()
    return value if value == value else float("inf")


def tolerance(base: Base) -> float:
    """Rounding of a whole network in the base's dtype; some families compute parts in float32 whatever it is."""
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(base.dtype, 6e-2)

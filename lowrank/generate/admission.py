"""Whether a request can be answered, how long its answer may be, and whether in steps or in a fixed batch."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.adapters.bank import Bank
from lowrank.generate import transformers_fallback
from lowrank.generate.constraint import Constraint
from lowrank.generate.request import ContextLengthExceeded, GenerationConfig, Prompt, RequestError
from lowrank.generate.sequence import GenerationSequence
from lowrank.models.base import Base
from lowrank.records import KIND_NAMES, Picture


@dataclass(frozen=True)
class RequestAdmission:
    """Of one base with its bank. `room`: tokens that the KV cache has place for."""

    base: Base
    bank: Bank
    room: int

    def sequence(
        self, prompt: Prompt, config: GenerationConfig, stop_tokens: frozenset[int], notice: str | None
    ) -> GenerationSequence:
        """The request as the generator sees it; RequestError if it can never be answered. `notice`: why all are
        answered in fixed batches; None: they are not."""
        virtual = self.bank.num_virtual(prompt.slot)
        max_new_tokens = self._max_new_tokens(len(prompt.token_L), prompt.slot, config, notice)
        sequence = GenerationSequence(
            prompt,
            config,
            virtual=virtual,
            stop_tokens=stop_tokens,
            max_new_tokens=max_new_tokens,
            tokenizer=self.base.tokenizer,
            constraint=self._constraint(config, stop_tokens),
        )
        steady = self.base.steady_length
        sequence.single_only = steady is not None and virtual + len(prompt.token_L) + max_new_tokens > steady
        self._refuse_media(prompt, fixed=sequence.single_only or notice is not None)
        sequence.needs_padding = (
            prompt.media is not None
            and self.base.media_encoder is not None
            and self.base.media_encoder.in_fixed_batches
        )
        if virtual and (notice or sequence.in_fixed_batch):
            long = f"texts of more than {steady} tokens are answered one by one"
            reason = notice or (long if sequence.single_only else "prompts with pictures are answered in fixed batches")
            raise RequestError(f"an adapter of virtual tokens cannot answer here: {reason}")
        return sequence

    def image_problem(self, fixed: bool) -> str | None:
        """Why nobody can be asked about pictures, in words; None: all is well. `fixed`: in a fixed batch."""
        if self.base.media_encoder is None:
            return "it was loaded to read text alone"
        fixed = fixed or self.base.media_encoder.in_fixed_batches
        return transformers_fallback.image_problem(self.base) if fixed else None

    def _refuse_media(self, prompt: Prompt, fixed: bool) -> None:
        """RequestError where the pictures of a prompt cannot be shown."""
        if prompt.media is None:
            return
        other = next((KIND_NAMES[each.kind] for each in prompt.media.items if not isinstance(each, Picture)), None)
        if other is not None:
            raise RequestError(
                f"{self.base.name} does not accept {other} here: lowrank trains on them but does not generate from "
                "them yet"
            )
        reason = self.image_problem(fixed)
        if reason is not None:
            raise RequestError(f"{self.base.name} does not accept pictures here: {reason}")

    def _max_new_tokens(self, length: int, slot: int, config: GenerationConfig, notice: str | None) -> int:
        """Tokens its answer may have; RequestError if its question alone is too long."""
        reach = self.bank.max_positions(slot)
        if length == 0:
            raise RequestError("the prompt has no tokens")
        if reach is not None and length >= reach:
            raise ContextLengthExceeded(
                f"the conversation has {length} tokens and the model's maximum context length is {reach}"
            )
        max_new_tokens = config.max_new_tokens if reach is None else min(config.max_new_tokens, reach - length)
        room = self.room - self.bank.num_virtual(slot)
        if notice is None and length + max_new_tokens > room:
            raise ContextLengthExceeded(
                f"the conversation has {length} tokens and may get {max_new_tokens} more; the cache has room for {room}"
            )
        return max_new_tokens

    def _constraint(self, config: GenerationConfig, stop_tokens: frozenset[int]) -> Constraint | None:
        vocabulary = self.base.model.get_output_embeddings().weight.shape[0]
        wrong = [token for token in config.logit_bias if not 0 <= token < vocabulary]
        if wrong:
            raise RequestError(f"logit_bias: the model has {vocabulary} tokens, there is no {wrong[0]}")
        if config.json_schema is None and config.grammar is None:
            return None
        return Constraint(self.base.tokenizer, config, vocabulary, stop_tokens)

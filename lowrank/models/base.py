"""The frozen base of a run: a transformers causal LM seen as a backbone and a head.

    batch --hidden()--> hidden_TD --head()--> log-probabilities (kernels/logprobs.py)

The backbone runs over the flat stream in one of two layouts. `packed`: one row of T tokens, attention
keeps documents apart. `padded`: one document per right-padded row, for models whose attention cannot
be told. Callers see the flat stream either way.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from lowrank.batches import Batch
from lowrank.devices import to_device
from lowrank.errors import ModelError
from lowrank.kernels.logprobs import Head
from lowrank.kernels.shape_bucketing import bucketed_rows, needs_bucketing
from lowrank.models.attention import packed as attention
from lowrank.models.attention.paged import PagedBatch
from lowrank.models.attention.prefix_sharing import SharedPrompts
from lowrank.models.attention.prefix_tuning import KVInjection, WithInjectedKV
from lowrank.models.attention.shifted_sparse import ShiftedSparse
from lowrank.models.batch_rows import BatchRows, packed_rows, padded_rows
from lowrank.models.layer_wrappers import LayerWrapper
from lowrank.models.layers import decoder_layers, find_backbone
from lowrank.models.loading.quiet import quiet_transformers
from lowrank.models.logit_transforms import logit_transforms
from lowrank.models.media_encoder import EncodedChunk, MediaEncoder, show_media
from lowrank.models.placement import Placement, Whole
from lowrank.models.positions import positions_of, stretching_of

_TYPES = "token_type_ids"


class Base:
    """A loaded model. `layout` is decided at load time (models/loading/pretrained.py); nothing here changes the
    weights."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        revision: str | None = None,
        placement: Placement | None = None,
    ) -> None:
        """`placement`: has kept the decoder layers already; left out: all weights stay where they are."""
        self.model = model
        self.causal_lm = model
        """Computes logits of text and generates: the model, or the part of it that can where the whole cannot (Llama
        4's composite class in transformers 5.24)."""
        self._text_config = model.config.get_text_config()
        self.tokenizer = tokenizer
        self.name = name
        self.backbone = find_backbone(model)
        """The model without its head."""
        self.placement: Placement = placement or Whole(model.get_input_embeddings().weight.device)
        """Where its weights are."""
        if self.placement.moves_layers:
            layers = decoder_layers(model)
            assert layers is not None, "checked before it was loaded"
            self.placement.finish(model, self.backbone, layers)
        self.revision = revision
        self.inject_kv: KVInjection | None = None
        """Replaces the keys and values of some rows by learned ones (prefix tuning), in the packed layout."""
        self.media_encoder: MediaEncoder | None = None
        """What shows it pictures and plays it sounds, where models/checks/media_isolation.py has tried that out."""
        self.layout = "packed"
        self.prompt_type: int | None = None
        """Of a prefix language model, which reads prompts both ways and answers from left to right: the
        `token_type_ids` by which its forward call knows a prompt's tokens; those of others are 1 minus that. None: it
        reads everything from left to right."""
        self.routed_by: object | None = None
        """The routing of the bank whose adapters are in its layers; there is one bank for a base."""
        self.tower_pass: Callable[[int, torch.Tensor], contextlib.AbstractContextManager[None]] | None = None
        """That bank's: around a pass of the tower over the pictures of a slot's document; None: nobody adapts it."""
        self.shift_attn: int | None = None
        """In training, attention is shifted sparse, in groups of so many tokens; None: whole."""
        self.layer_wrapper: LayerWrapper | None = None
        """What has a forward pass of its own around decoder layers."""
        self.kv_cache_mismatches: dict[object, str | None] = {}
        """What models/checks/kv_cache.py has found out, by what of this base it depends on."""
        self.router_aux_loss_coef: float | None = None
        """Weight of the loss of a mixture's routers in training; None: it plays no part."""
        self._keeps_router_logits = False
        self._router_logits: tuple[torch.Tensor, ...] = ()
        self.own_attention: str = self._text_config._attn_implementation
        """What transformers chose for this model; used for the padded layout and for generation."""
        self.multiplier, self.softcap = logit_transforms(model.config)[0]
        self._stretching = stretching_of(self._text_config)
        accepted = inspect.signature(self.backbone.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self.takes_types = _TYPES in accepted
        """Whether its forward call can be told of what kind each token is: part of a picture, or of a prompt."""
        attention.register()

    @property
    def device(self) -> torch.device:
        """Where the base computes."""
        if self.placement.moves_layers:
            return self.placement.device
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the base computes in."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def hidden_size(self) -> int:
        """D of the head's input."""
        return self.model.get_output_embeddings().weight.shape[1]

    @property
    def head_dim(self) -> int | None:
        """Rows of a head in the matrices that make queries and keys; None where the configuration does not say."""
        text = self._text_config
        heads = getattr(text, "num_attention_heads", None)
        return getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)

    @contextlib.contextmanager
    def using_attention(self, name: str) -> Generator[None, None, None]:
        """Run with another attention function."""
        before = self._text_config._attn_implementation
        self._set_attention(name)
        try:
            yield
        finally:
            self._set_attention(before)

    def set_layout(self, layout: str) -> None:
        """Set the layout (`packed` or `padded`) of all passes that follow, and the attention that goes with it."""
        self.layout = layout
        self._set_attention(attention.NAME if layout == "packed" else self.own_attention)

    def _set_attention(self, name: str) -> None:
        if self._text_config._attn_implementation != name:
            wanted = _attention_by_part(self.model.config, self._text_config, name)
            with quiet_transformers():  # it advises about families that ignore the request; the leak test sees those
                self.model.set_attn_implementation(wanted)

    def layout_of(self, batch: Batch) -> str:
        """The layout in which this batch goes through."""
        return "padded" if batch.media and self.media_encoder is not None and self.media_encoder.padded else self.layout

    def filled(self, batch: Batch) -> Batch:
        """The batch, with a filler where numbers of rows should be few."""
        if self.layout_of(batch) != "packed" or not needs_bucketing(self.device, self.dtype):
            return batch
        return replace(batch, filler=bucketed_rows(batch.num_tokens) - batch.num_tokens)

    def rows(self, batch: Batch) -> BatchRows:
        """How `hidden` will lay out `batch`."""
        return packed_rows(batch) if self.layout_of(batch) == "packed" else padded_rows(batch)

    def hidden(self, batch: Batch, training: bool = False, tokens_of_step: int | None = None) -> torch.Tensor:
        """The last hidden states of the flat stream, (T, D), after the final norm.

        `tokens_of_step`: of all passes of the training step this one belongs to; None: it is the only one.
        """
        self._keeps_router_logits = training and self.router_aux_loss_coef is not None
        kind, limit = self._stretching
        if kind == "dynamic" and max(batch.document_lengths) > limit:
            raise ModelError(
                f"{self.name} stretches its rotary embedding to the longest document it has seen (rope_type dynamic), "
                f"so documents of more than {limit} tokens would change one another: set data.max_length to {limit}"
            )
        if batch.media and not batch.pixels:
            batch = show_media(self, batch)
        if self.layout_of(batch) == "packed":
            return self._stream(batch, training, tokens_of_step or batch.num_tokens)[: batch.num_tokens]
        if self.layout == "padded":
            return self._padded(batch)
        if training:
            raise ModelError(
                f"{self.name} was loaded for inference and cannot be trained: its texts run packed, its documents with "
                "media padded; load it for training"
            )
        with self.using_attention(self.own_attention):
            return self._padded(batch)

    def _padded(self, batch: Batch) -> torch.Tensor:
        """The last hidden states of the flat stream, whose documents are rows of the padded layout."""
        longest = max(batch.lengths)
        segment_T = torch.arange(len(batch.lengths), device=batch.token_T.device).repeat_interleave(
            batch.start_S1.diff(), dim=0, output_size=batch.num_tokens
        )
        token_SL = batch.token_T.new_zeros(len(batch.lengths), longest)
        token_SL[segment_T, batch.position_T] = batch.token_T
        seen_SL = torch.zeros_like(token_SL)
        seen_SL[segment_T, batch.position_T] = 1
        position = torch.arange(longest, device=token_SL.device).expand_as(token_SL)
        if batch.mrope_position_3T is not None:
            position = position.expand(3, *position.shape).clone()
            position[:, segment_T, batch.position_T] = batch.mrope_position_3T
        hidden_SLD = self.call(
            token_SL,
            position_ids=position,
            attention_mask=seen_SL,
            **self.types_of_prompts(batch.prompts, token_SL),
            **self._pictures_of(batch, token_SL),
        )
        return hidden_SLD[segment_T, batch.position_T]

    def types_of_prompts(self, prompts: Sequence[int], token_SL: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the own masks of a prefix language model are told beside `token_SL`, whose rows begin with `prompts`
        tokens that ask; of other models nothing."""
        if self.prompt_type is None:
            return {}
        prompt_S = to_device(torch.tensor(prompts), token_SL.device)
        in_prompt_SL = torch.arange(token_SL.shape[1], device=token_SL.device) < prompt_S[:, None]
        return {_TYPES: torch.where(in_prompt_SL, self.prompt_type, 1 - self.prompt_type)}

    def _stream(self, batch: Batch, training: bool, tokens_of_step: int) -> torch.Tensor:
        """The last hidden states of the packed layout, with those of the filler at the end."""
        token_T, position_T, start_S1 = batch.token_T, batch.position_T, batch.start_S1
        lengths, prefixes = batch.lengths, batch.prefixes
        prompts = batch.prompts if self.prompt_type is not None and max(batch.prompts, default=0) > 1 else ()
        if batch.filler:
            token_T = F.pad(token_T, (0, batch.filler))
            position_T = torch.cat([position_T, torch.arange(batch.filler, device=position_T.device)])
            start_S1 = F.pad(start_S1, (0, 1), value=len(token_T))
            lengths, prefixes = (*lengths, batch.filler), (*prefixes, 0)
            prompts = (*prompts, 0) if prompts else ()
        blocks = self.media_encoder.blocks(token_T) if self.media_encoder is not None and batch.pixels else None
        boundaries: attention.Packed | attention.AttentionStream = attention.Packed(start_S1, lengths, prompts, blocks)
        if training and self.shift_attn is not None:
            assert not any(prefixes), "shared prompts are not in groups"
            assert blocks is None, "refused when the base was given its media encoder"
            boundaries = ShiftedSparse(lengths, self.shift_attn, token_T.device)
        elif any(prefixes):
            boundaries = SharedPrompts(lengths, prefixes, token_T.device, prompts, blocks)
        packed = self._with_prefixes(boundaries)
        if self.layer_wrapper is not None:
            self.layer_wrapper.begin(training, batch.num_tokens, tokens_of_step)
        position = position_T[None]
        if batch.mrope_position_3T is not None:
            behind = position_T[batch.num_tokens :].expand(3, -1)
            position = torch.cat([batch.mrope_position_3T, behind], dim=1)[:, None]
        shown = self._pictures_of(batch, token_T[None])
        return self.call(token_T[None], position_ids=position, packed=packed, **shown)[0]

    def _pictures_of(self, batch: Batch, token: torch.Tensor) -> dict[str, Any]:
        return self.media_encoder.options(batch, token) if self.media_encoder is not None else {}

    def call(self, token: torch.Tensor, **options: Any) -> torch.Tensor:
        """(N, T) tokens -> (N, T, D): the last hidden states of the model's own forward pass, with these options;
        `around`: what has to be around it."""
        if not self._takes_positions:
            options.pop("position_ids")
        with options.pop("around", contextlib.nullcontext()):
            return self._call(token, options)

    def _call(self, token: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        if not self._keeps_router_logits:
            return self.backbone(input_ids=token, use_cache=False, **options).last_hidden_state
        output = self.backbone(input_ids=token, use_cache=False, output_router_logits=True, **options)
        self._router_logits = tuple(output.router_logits)
        return output.last_hidden_state

    def take_router_logits(self) -> tuple[torch.Tensor, ...]:
        """Of the last training pass where `router_aux_loss_coef` is set: (rows, E) of each layer of experts."""
        found, self._router_logits = self._router_logits, ()
        return found

    def forward_with_kv_cache(
        self, token_T: torch.Tensor, step: PagedBatch, chunks: Sequence[EncodedChunk] = ()
    ) -> torch.Tensor:
        """The last hidden states, (T, D), of new tokens of sequences whose older ones are in the cache of `step`.
        `chunks`: where they are of documents with pictures, one for each sequence of the step."""
        if self.layer_wrapper is not None:
            self.layer_wrapper.begin(training=False)
        if self.media_encoder is not None and any(each.encoded for each in chunks):
            shown = self.media_encoder.in_chunks(chunks, token_T, step.position_T)
            return self.call(token_T[None], packed=self._with_prefixes(step), **shown)[0]
        return self.call(token_T[None], position_ids=step.position_T[None], packed=self._with_prefixes(step))[0]

    def _with_prefixes(self, stream: Any) -> Any:
        return stream if self.inject_kv is None else WithInjectedKV(stream, self.inject_kv)

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest sequence its positions are made for; None where nothing limits it."""
        return positions_of(self.model.config)

    @property
    def steady_length(self) -> int | None:
        """Up to this many tokens a sequence's rotary embedding does not depend on how long it is; None: at any."""
        kind, limit = self._stretching
        return limit if kind else None

    def padded_tokens(self, lengths: tuple[int, ...]) -> int:
        """What segments of these lengths cost in one forward pass, in tokens."""
        return self.tokens_in_pass(len(lengths), sum(lengths), max(lengths, default=0))

    def tokens_in_pass(self, number: int, total: int, longest: int) -> int:
        """The same, of so many segments of `total` tokens."""
        return total if self.layout == "packed" else number * longest

    def may_share(self, lengths: tuple[int, ...]) -> bool:
        """Whether segments of these lengths may go through in one pass.

        A LongRoPE model (Phi-3 and 4) rotates every position otherwise as soon as one document of the pass is longer
        than those it was first trained on.
        """
        kind, limit = self._stretching
        return kind != "longrope" or max(lengths) <= limit or min(lengths) > limit

    def head(self) -> Head:
        """The model's own head, as logprobs() wants it. Computed with inside `placement.head`."""
        linear = self.model.get_output_embeddings()
        weight_VD, bias_V = self.placement.head_tensors() or (linear.weight, getattr(linear, "bias", None))
        return Head(weight_VD, bias_V, self.multiplier, self.softcap)


def _attention_by_part(config: Any, text: Any, name: str) -> Any:
    """What transformers is to set for a configuration whose language model runs with attention `name`: towers beside it
    keep their own, which sees both ways."""
    parts = {key: part for key in config.sub_configs if (part := getattr(config, key, None)) is not None}
    if config is text or not parts:
        return name if config is text else config._attn_implementation
    below = {key: _attention_by_part(part, text, name) for key, part in parts.items()}
    leads = any(isinstance(each, dict) or parts[key] is text for key, each in below.items())
    return {"": name, **below} if leads else config._attn_implementation

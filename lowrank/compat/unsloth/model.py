"""A base with adapters of our bank, as PEFT would show it: what the trainers of TRL and transformers train.

    TunedModel                                 a peft.PeftModel to whoever asks
      .base_model.model                        transformers' own model, its linears routed by the bank
      ...q_proj.lora_A.default.weight          the bank's masters, hung into the tree under PEFT's names

Nothing of the model's code is replaced: before each pass of the backbone the routing is told whose rows come, and the
working copies of the adapter are brought up to date.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from lowrank.adapters.bank import Bank
from lowrank.adapters.targets import is_copied, name_of
from lowrank.adapters.variants import AdapterConfig
from lowrank.batches import BASE_SLOT
from lowrank.checkpoints.base_tensors import on_model
from lowrank.checkpoints.own_tokens import learn_tokens
from lowrank.checkpoints.peft_config import BaseDescription, describe_base, to_peft
from lowrank.checkpoints.peft_layout import AdapterOnDisk, load_adapter
from lowrank.compat.unsloth import sampling, saving
from lowrank.compat.unsloth.arguments import warn_once
from lowrank.compat.unsloth.pass_routing import PassRouting
from lowrank.compat.unsloth.peft_tree import TrainedHead, Tuner, hang, unhang
from lowrank.errors import ConfigError, ModelError
from lowrank.kernels.logprobs import logprobs
from lowrank.models.base import Base
from lowrank.models.checkpointing.activation_checkpointing import (
    set_activation_checkpointing,
    set_activation_checkpointing_under,
)
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import locate

DEFAULT = "default"
"""PEFT's name of the first adapter."""
IGNORED = -100
"""The label that carries no loss."""
_OF_OUR_LOSS = {"position_ids", "use_cache", "num_items_in_batch", "return_dict"}
_LOG = logging.getLogger(__name__)


class TunedModel(peft.PeftModel):
    """A frozen base with adapters by name, one of them at work. Computes in the base's dtype, trains float32 masters.

    Unlike in PEFT, `bf16`/`fp16` of a trainer's arguments have no effect: the dtype was chosen when the model loaded.
    With `labels` in training the logits are never made (`logits` is None); in evaluation they are.
    """

    is_front_of_lowrank = True
    """What the translation of trainers' arguments asks for."""

    def __init__(self, base: Base, settings: ModelConfig) -> None:
        nn.Module.__init__(self)  # PeftModel's would build adapters of its own
        self._adapters_disabled = False
        self._is_prompt_learning = False
        self.peft_type = peft.PeftType.LORA
        self.special_peft_forward_args: set[str] = set()
        self.base_model = Tuner(base.model)
        self.base = base
        self.settings = settings
        self.bank = Bank(base)  # what is to be packed was packed as it loaded
        self.routing = self.bank.routing
        self.max_seq_length: int | None = None
        self.slots: dict[str, int] = {}
        self.seeds: dict[str, int] = {}
        self._passes = PassRouting(self.bank)
        self._precision_reported = False
        base.backbone.register_forward_pre_hook(self._route, with_kwargs=True)
        self._taken = {*inspect.signature(base.backbone.forward).parameters} - {"past_key_values"}
        """What the backbone reads: tokens, and pictures where it sees some."""

    # --- adapters by name -------------------------------------------------------------------------------------

    def add_adapter(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, adapter_name: str, peft_config: Any, **others: Any
    ) -> None:
        """One more adapter like one that is there, as trainers do for a reference. ConfigError for any other."""
        del others
        like = next((name for name, own in self.peft_config.items() if own == peft_config), None)
        if like is None:
            raise ConfigError(f"add_adapter: {adapter_name} has other settings than the adapters that are there")
        self.attach(adapter_name, self.bank.slots[self.slots[like]].config, self.seeds[like])

    def attach(
        self, name: str, config: AdapterConfig, seed: int, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """A new adapter; the first is at work at once. ModelError for what the model has no place for."""
        if name in self.slots:
            raise ConfigError(f"there is an adapter {name!r} already")
        if config.unmergeable is not None:  # the model runs as transformers runs it, without rows of ours
            raise ConfigError(f"{name}: {config.title} adapters are trained and served by lowrank itself, not here")
        self._let_trainers_see_the_head(config)
        slot = self.bank.add(config, seed=seed)
        if tensors is not None:
            self.bank.load(slot, tensors)
        self.slots[name], self.seeds[name] = slot, seed
        own = self.bank.slots[slot]
        for path, parameter in own.parameters.items():
            hang(self.base.model, path, parameter, name, own.copies)
        saved = self.bank.saved(slot)
        fields = to_peft(saved.config, saved.ranks, own.copies, self.description)
        self.base_model.peft_config[name] = peft.get_peft_config({**fields, "inference_mode": False})
        if len(self.slots) == 1:
            self.set_adapter(name)
        else:
            for parameter in own.parameters.values():
                parameter.requires_grad_(False)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """The adapter at work, which alone is trained."""
        if adapter_name not in self.slots:
            raise ConfigError(f"there is no adapter {adapter_name!r}; there are {', '.join(self.slots)}")
        for name, slot in self.slots.items():
            for parameter in self.bank.parameters(slot).values():
                parameter.requires_grad_(name == adapter_name and not inference_mode)
        self.active_adapter = adapter_name
        self.base_model.active_adapters = [adapter_name]

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out, and its tensors. The first of those that are left is at work then, if it was."""
        if adapter_name not in self.slots:
            raise ConfigError(f"there is no adapter {adapter_name!r}; there are {', '.join(self.slots) or 'none'}")
        slot = self.slots.pop(adapter_name)
        del self.seeds[adapter_name], self.base_model.peft_config[adapter_name]
        for path in self.bank.parameters(slot):
            unhang(self.base.model, path, adapter_name, self.bank.slots[slot].copies)
        self.bank.remove(slot)
        self._passes.forget(slot)
        if self.base_model.active_adapters == [adapter_name]:
            self.base_model.active_adapters = []
            vars(self).pop("_active_adapter", None)
            self.active_adapter = ""
            if self.slots:
                self.set_adapter(next(iter(self.slots)))

    def _let_trainers_see_the_head(self, config: AdapterConfig) -> None:
        """TRL multiplies with `weight` of the head itself: where a copy of it is trained, that has to be the copy."""
        model = self.base.model
        head = model.get_output_embeddings()
        name = name_of(model, head)
        if is_copied(name, getattr(config, "modules_to_save", ())) and not isinstance(head, TrainedHead):
            model.set_submodule(name, TrainedHead(head, name, self.routing))

    @contextmanager
    def disable_adapter(self) -> Generator[None, None, None]:
        """The bare base, for a while."""
        before, self._adapters_disabled = self._adapters_disabled, True
        try:
            yield
        finally:
            self._adapters_disabled = before

    def load_adapter(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_id: str | Path, adapter_name: str = DEFAULT, **others: Any
    ) -> None:
        """Read an adapter's files (PEFT's or ours) into the adapter of that name, or into a new one."""
        del others  # whether it is trainable is what `set_adapter` says
        saved = on_model(load_adapter(Path(model_id)), self.base.model)
        for notice in learn_tokens(self.base.tokenizer, {adapter_name: Path(model_id)}):
            warn_once(notice)
        if adapter_name in self.slots:
            self.bank.load(self.slots[adapter_name], saved.tensors)
        else:
            self.attach(adapter_name, saved.config, 0, saved.tensors)

    def get_base_model(self) -> Any:
        """transformers' own model, with the adapter at work in it."""
        return self.base_model.model

    def on_disk(self, name: str | None = None) -> AdapterOnDisk:
        """The adapter at work (or another) as files have it."""
        saved = self.bank.saved(self.slots[name or self.active_adapter])
        return AdapterOnDisk(saved.config, saved.tensors, saved.ranks)

    @property
    def description(self) -> BaseDescription:
        """What adapter files say about the base."""
        return describe_base(self.base.model, locate(self.settings.path), self.settings.revision)

    # --- computing --------------------------------------------------------------------------------------------

    def _route(self, backbone: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Before each pass of the backbone."""
        del backbone
        given = next(each for each in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if each is not None)
        slot = self._slot_at_work()
        learns = slot != BASE_SLOT and self.training and torch.is_grad_enabled()
        seed = self.seeds[self.active_adapter] if learns else None
        self._passes.begin(slot, given.shape[0] * given.shape[1], given.device, seed)

    def _slot_at_work(self) -> int:
        """Its working copies are up to date."""
        slot = BASE_SLOT if self._adapters_disabled else self.slots.get(getattr(self, "active_adapter", ""), BASE_SLOT)
        self._passes.refresh(slot)
        return slot

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' arguments and outputs; `num_items_in_batch`: what the loss is divided by."""
        with self._own_precision():
            whole = not args and kwargs.keys() - self._taken <= _OF_OUR_LOSS
            routers = getattr(self.base.model.config.get_text_config(), "output_router_logits", False)
            if labels is None or not self.training or not whole or routers:
                return self.base.model(*args, **kwargs if labels is None else {**kwargs, "labels": labels})
            return self._scored(labels, **kwargs)

    def _scored(self, labels: torch.Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        """The loss, from the rows that carry it alone."""
        kwargs = {name: value for name, value in kwargs.items() if name not in ("return_dict", "use_cache")}
        hidden_BLD = self.base.backbone(**kwargs, use_cache=False).last_hidden_state[:, :-1]
        target_BL = labels[:, 1:].to(hidden_BLD.device)
        counts_BL = target_BL != IGNORED
        slot = BASE_SLOT if self._adapters_disabled else self.slots[self.active_adapter]
        logprob_K = logprobs(hidden_BLD[counts_BL], target_BL[counts_BL], self.bank.head(slot))
        total = counts_BL.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=-logprob_K.sum() / total)  # pyright: ignore[reportArgumentType]

    @contextmanager
    def _own_precision(self) -> Generator[None, None, None]:
        kind = self.base.device.type
        if torch.is_autocast_enabled(kind):
            requested = torch.get_autocast_dtype(kind)
            if requested != self.base.dtype and not self._precision_reported:
                self._precision_reported = True
                _LOG.warning("the trainer asks for %s; the model was loaded to compute in %s, and does (dtype=)",
                             requested, self.base.dtype)  # fmt: skip
        with torch.autocast(kind, enabled=False):
            yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, in evaluation mode. What `apply_chat_template` or a tokenizer gives may stand in the place
        of `input_ids`, as a whole."""
        if args and isinstance(args[0], Mapping):
            kwargs, args = {**args[0], **kwargs}, args[1:]
        for name in ("input_ids", "inputs"):
            if isinstance(kwargs.get(name), Mapping):
                kwargs = {**kwargs.pop(name), **kwargs}
        before = self.training
        self.eval()
        try:
            slot = self._slot_at_work()
            with self._own_precision(), torch.no_grad():
                self._passes.begin_generation(slot)
                return self.base.model.generate(*args, **kwargs)
        finally:
            self.train(before)

    def fast_generate(
        self,
        prompts: str | Sequence[str],
        sampling_params: Any = None,
        lora_request: Any = None,
        use_tqdm: bool = False,
    ) -> list[sampling.RequestOutput]:
        """vLLM's way to ask: answers to texts. `lora_request`: what `load_lora` gave; None is the bare base."""
        del use_tqdm
        return sampling.fast_generate(self, prompts, sampling_params, lora_request)

    def save_lora(self, save_directory: str | Path, **others: Any) -> None:
        """`save_pretrained`, by the name it has beside vLLM."""
        self.save_pretrained(save_directory, **others)

    def load_lora(self, save_directory: str | Path, load_tensors: bool = True) -> sampling.LoRARequest:
        """Read an adapter's folder for `fast_generate`; the adapter that is trained stays as it is."""
        del load_tensors
        return sampling.load_lora(self, save_directory)

    def train(self, mode: bool = True) -> TunedModel:
        """As in torch."""
        self._passes.forget()
        super().train(mode)
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Any = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Keep the input of each decoder layer alone; always torch's non-reentrant form."""
        del activation_checkpointing_kwargs
        if every_n_layers != 1 or offload:
            _LOG.warning("every_n_layers and offload have no effect here: every layer is computed again, in place")
        set_activation_checkpointing_under(self.base.model, lambda: self.routing.using(self.routing.current))
        self._recomputes = True

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations."""
        set_activation_checkpointing(self.base.model, "none")
        self._recomputes = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **others: Any) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **others)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of `activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    _recomputes = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are computed again."""
        return self._recomputes

    is_activation_checkpointing = is_gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """Nothing: only reentrant checkpointing needs it."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained, all), those of packed layers counted as what they stand for."""
        trained = sum(each.numel() for each in self.parameters() if each.requires_grad)
        packed = sum(
            module.in_features * module.out_features
            for module in self.base.model.modules()
            if hasattr(module, "dense_weight") and not isinstance(getattr(module, "weight", None), nn.Parameter)
        )
        return trained, packed + sum(each.numel() for each in self.parameters())

    # --- export ----------------------------------------------------------------------------------------------

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | Path, **others: Any
    ) -> None:
        """adapter_config.json and adapter_model.safetensors, as PEFT reads them. See `saving.save_lora`."""
        saving.save_lora(self, Path(save_directory), **others)

    def save_pretrained_merged(
        self, save_directory: str | Path, tokenizer: Any = None, save_method: Any = "merged_16bit", **others: Any
    ) -> None:
        """The whole model, in transformers' layout. See `saving.save_merged`."""
        saving.save_merged(self, Path(save_directory), tokenizer, save_method, **others)

    def save_pretrained_gguf(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        quantization_method: Any = "fast_quantized",
        **others: Any,
    ) -> None:
        """GGUF files. See `saving.save_gguf`."""
        saving.save_gguf(self, Path(save_directory), tokenizer, quantization_method, **others)

    def save_pretrained_torchao(self, *args: Any, **kwargs: Any) -> None:
        """Refused."""
        del args, kwargs
        raise ConfigError(f"save_pretrained_torchao: {saving.NO_SUCH_METHOD['torchao']}")

    def push_to_hub(self, repo_id: str, **others: Any) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The adapter, as a repository."""
        return saving.push(saving.save_lora, self, repo_id, **others)

    def push_to_hub_merged(
        self, repo_id: str, tokenizer: Any = None, save_method: Any = "merged_16bit", **others: Any
    ) -> dict[str, Any]:
        """The whole model, as a repository."""
        return saving.push(saving.save_merged, self, repo_id, tokenizer=tokenizer, save_method=save_method, **others)

    def push_to_hub_gguf(
        self, repo_id: str, tokenizer: Any = None, quantization_method: Any = "fast_quantized", **others: Any
    ) -> dict[str, Any]:
        """GGUF files, as a repository."""
        return saving.push(
            saving.save_gguf, self, repo_id, tokenizer=tokenizer, quantization_method=quantization_method, **others
        )

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the base in memory is shared, and may be packed."""
        del args, kwargs
        raise ModelError("merge_and_unload: merge into files instead, with save_pretrained_merged(folder, tokenizer)")

"""From a folder or a hub name to a `Base` that is known to work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

from lowrank.errors import LowrankError, ModelError, raise_all
from lowrank.hub_reach import hub_or_cache
from lowrank.kernels.accelerators import accelerators, processor_has_bf16
from lowrank.models import layer_wrappers, rope_scaling
from lowrank.models.base import Base
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.checkpointing.memory_efficient_modules import same_bits, use_memory_efficient_modules
from lowrank.models.checks.isolation import LIKE_THE_FIRST_CHATGLM, check_head, choose_layout
from lowrank.models.checks.kv_cache import known_kv_cache_mismatch
from lowrank.models.config import FreezeConfig, ModelConfig
from lowrank.models.config_numbers import check_stored
from lowrank.models.freezing import train_everything, train_only
from lowrank.models.loading import kind
from lowrank.models.loading.checkpoint_files import checkpoint_files, stored_tensors
from lowrank.models.loading.layers_arriving import LayersArriving
from lowrank.models.loading.model_class import model_class
from lowrank.models.loading.quantize_on_load import Packing, kept_dense, load_packed
from lowrank.models.loading.quantized_copies import find_copy
from lowrank.models.loading.quiet import quiet_transformers
from lowrank.models.loading.tokenizer import FILE_FAULTS as FILE_FAULTS
from lowrank.models.loading.tokenizer import cannot_load as cannot_load
from lowrank.models.loading.tokenizer import check_model as check_model
from lowrank.models.loading.tokenizer import load_tokenizer as load_tokenizer
from lowrank.models.packaged import TINY as TINY
from lowrank.models.packaged import locate
from lowrank.models.placement import Placement, has_values, move_layer, move_rest
from lowrank.models.prequantized import reader_for
from lowrank.models.rope_scaling import stretch
from lowrank.models.storages.dense import DenseConfig
from lowrank.notices import log_notice

DENSE = "dense"
"""The storage that leaves weights as they are."""


def choose_device(config: ModelConfig) -> torch.device:
    """The device the settings ask for; `auto` is the GPU if there is one: CUDA (ROCm's too), Intel's xpu, Apple's
    mps."""
    there = accelerators()
    if config.device == "auto":
        return there[0] if there else torch.device("cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        known = "cpu, cuda, cuda:1, xpu, mps, auto"
        raise ModelError(f"model.device: {config.device!r} is not a device; {known}") from error
    if device.type == "cpu":
        return device
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device: this machine has no CUDA device that torch can use; say cpu or auto")
    if device.type not in [each.type for each in there]:
        raise ModelError(f"model.device: {config.device!r} cannot be used here; say cpu or auto")
    count = {"cuda": torch.cuda, "xpu": torch.xpu}[device.type].device_count() if device.type != "mps" else 1
    if (device.index or 0) >= count:
        raise ModelError(f"model.device: {config.device} is not there; this machine has {count}")
    return device


def choose_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it faster; on older GPUs float16, whose losses are scaled
    (train/loss_scale.py); else float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 emulates it, many times slower
        return torch.bfloat16 if fast else torch.float16
    if device.type == "xpu":
        return torch.bfloat16 if torch.xpu.is_bf16_supported() else torch.float32
    if device.type == "mps":
        return torch.float32  # which of its 16 bits trains rightly, nobody has tried
    return torch.bfloat16 if processor_has_bf16() else torch.float32


def load(
    config: ModelConfig,
    *,
    tokenizer: Any = None,
    train_all: bool = False,
    freeze: FreezeConfig | None = None,
    notify: Callable[[str], None] = log_notice,
    placement: Placement | None = None,
) -> Base:
    """Load, freeze, test. `notify` receives what a person should know. `train_all`: the base's own parameters are
    trained, or those that `freeze` chooses. `placement`: where its weights are kept, if not all on the device.

    Raises ModelError: not found, no safetensors, damaged, weights missing from the checkpoint or of another
    shape, or documents would see one another.
    """
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    if train_all and config.storage.type != DENSE:
        raise ModelError(
            f"tuning: full trains the base's own weights, and model.storage: {config.storage.type} keeps them rounded: "
            "set model.storage to dense, or train an adapter (tuning: adapter)"
        )
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config)
    kind.check_path(locate(config.path))  # the tokenizer may come from elsewhere
    if config.random_init is None:
        kind.check_weights(locate(config.path))
    copy = None if config.storage.type == DENSE else _copy_of(config, dtype)
    moved = placement if placement is not None and placement.moves_layers else None
    assert moved is None or not train_all, "checked with the settings"
    arriving = None if moved is None else LayersArriving(partial(_keep_layer, config, device, moved))
    with hub_or_cache(locate((copy or config).path), (copy or config).revision):
        model, described = _load_model(copy or config, dtype, device, train_all, arriving)
    if copy is not None:
        model.config.name_or_path = locate(config.path)
        described.insert(0, f"reading {copy.path}, which `lowrank quantize` made of {config.path}")
    for sentence in described:
        notify(sentence)
    model.to(device) if moved is None else move_rest(model, device)
    model.requires_grad_(False)
    if train_all and freeze is not None:
        train_only(model, freeze)
    elif train_all and (sentence := train_everything(model)):
        notify(sentence)
    model.eval()  # also in training: dropout of the base would tie jobs together
    if config.memory_efficient_modules:
        use_memory_efficient_modules(model, None if moved is None else _same_bits_of_whole)
    base = Base(model, tokenizer, config.path, config.revision, moved)
    check_head(base)
    notice = choose_layout(base, config.attention)
    if notice:
        notify(notice)
    if config.shift_attn is not None:
        _shift_attention(base, config.shift_attn, notice)
    _wrap_layers(base, config, notice, train_all)
    set_activation_checkpointing(model, config.activation_checkpointing)
    return base


def _keep_layer(config: ModelConfig, device: torch.device, placement: Placement, layer: torch.nn.Module) -> None:
    """A decoder layer has its weights: what is done to a loaded model is done to it now, while they can be read."""
    move_layer(layer, device)
    layer.requires_grad_(False).eval()
    if config.memory_efficient_modules:
        use_memory_efficient_modules(layer)
    placement.keep(layer)


def _same_bits_of_whole(module: torch.nn.Module, replacement: Any) -> bool:
    """`same_bits` for what lies outside the decoder layers; what is in them was tried when it came."""
    return all(map(has_values, (*module.parameters(), *module.buffers()))) and same_bits(module, replacement)


def _shift_attention(base: Base, group: int, why_padded: str | None) -> None:
    if base.layout != "packed":
        raise ModelError(
            "model.shift_attn: groups of tokens are told to the attention as documents are, which this base cannot be "
            f"told ({why_padded or 'model.attention: padded'}); leave shift_attn out"
        )
    if base.prompt_type is not None:
        raise ModelError(
            "model.shift_attn: this base reads prompts both ways, and groups of tokens are read from left to right; "
            "leave shift_attn out"
        )
    base.shift_attn = group


def _wrap_layers(base: Base, config: ModelConfig, why_padded: str | None, train_all: bool) -> None:
    """After the tests of the plain model: wrap its decoder layers, if that is asked for or saved with it."""
    where = layer_wrappers.SETTING
    if config.layer_wrapper is None and layer_wrappers.saved_wrapper(base.model.config) is None:
        return
    if train_all and base.dtype == torch.float16:
        raise ModelError(
            f"{where}: float16 gradients are scaled, and those of its own losses would not be; set model.dtype: "
            "bfloat16"
        )
    if base.steady_length is not None:
        raise ModelError(
            f"{where}: this base stretches its rotary embedding by a text's length, so long texts are answered by "
            "transformers, which has no such layers; take another base"
        )
    if base.layout != "packed":
        raise ModelError(
            f"{where}: wrapped layers are told where documents begin, and this base cannot be told that "
            f"({why_padded or 'model.attention: padded'})"
        )
    stored = stored_tensors(checkpoint_files(locate(config.path), config.revision))
    base.layer_wrapper = layer_wrappers.attach(base.model, config.layer_wrapper, stored)
    assert base.layer_wrapper is not None
    for module in base.layer_wrapper.added:
        module.requires_grad_(train_all)
    apart = known_kv_cache_mismatch(base)
    if apart is not None:
        raise ModelError(f"{where}: this base cannot be converted: {apart}")


def _copy_of(config: ModelConfig, dtype: torch.dtype) -> ModelConfig | None:
    """The same model as `lowrank quantize` has written it, packed as `config` asks; None if it has not."""
    copy = find_copy(locate(config.path), config.revision, config.storage, dtype)
    return copy and config.model_copy(update={"path": str(copy), "revision": None, "storage": DenseConfig()})


def _load_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    train_all: bool,
    arriving: LayersArriving | None = None,
) -> tuple[Any, list[str]]:
    """The model, and sentences about what in the checkpoint has no place in it and what of it is not packed."""
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.runs_own_code}
    path = locate(config.path)
    packing = None
    with quiet_transformers():
        try:
            shape = transformers.AutoConfig.from_pretrained(path, **options)
            stretch(shape, config.rope_scaling)
            if config.storage.type != DENSE and (config.layer_wrapper or layer_wrappers.saved_wrapper(shape)):
                raise ModelError(
                    f"{layer_wrappers.SETTING}: packed weights are not trained, as those of wrapped layers have to be; "
                    "leave model.storage out"
                )
            if config.random_init is not None:
                return _random_model(config, shape, dtype, config.random_init), []
            check_stored(path, config.revision, shape)
            packing = _packing(config, shape, dtype, device, train_all)
            if arriving is not None:
                packing = packing or Packing(None, None, device, dtype)
                packing.layers_arriving = arriving
            if packing:
                model, report = load_packed(path, packing, shape, **options)
            else:
                loaded: Any = model_class(shape).from_pretrained(
                    path,
                    **options,
                    **({"config": shape} if config.rope_scaling else {}),
                    dtype=dtype,
                    use_safetensors=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are listed below, all at once
                )
                model, report = loaded
        except LowrankError:
            raise
        except FILE_FAULTS as error:
            raise ModelError(cannot_load("the model", config, error)) from error
    problems = [f"{name}: not in the checkpoint" for name in sorted(report["missing_keys"])]
    problems += [
        f"{name}: shape {tuple(saved)} in the checkpoint, {tuple(wanted)} in the model"
        for name, saved, wanted in sorted(report["mismatched_keys"])
    ]
    problems += packing.problems if packing else []
    raise_all(ModelError, f"{config.path}: the checkpoint does not fill the model", problems)
    if model.get_output_embeddings() is None:
        of_own = f" that its own code names; {LIKE_THE_FIRST_CHATGLM}" if config.runs_own_code else ""
        raise ModelError(f"{config.path}: {type(model).__name__} has no language-model head{of_own}")
    if dtype == torch.float64:  # grouped expert kernels know no float64
        model.config._experts_implementation = "eager"
    spare = [name for name in sorted(report["unexpected_keys"]) if not layer_wrappers.is_added(name)]
    packs = packing is not None and (packing.storage or packing.reader)
    described = [_not_used(spare), _not_packed(model) if packs else None]
    described += [packing.reader.notice] if packing and packing.reader else []
    described += [rope_scaling.describe(shape, config.rope_scaling)] if config.rope_scaling else []
    return model, [sentence for sentence in described if sentence]


def _random_model(config: ModelConfig, shape: Any, dtype: torch.dtype, seed: int) -> Any:
    """As transformers begins a model; what else draws random numbers goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=config.runs_own_code)


def _packing(
    config: ModelConfig, shape: Any, dtype: torch.dtype, device: torch.device, train_all: bool
) -> Packing | None:
    """How linear layers are packed while they load; None if they are not. Takes what config.json says about it out."""
    holders = [each for each in (shape, shape.get_text_config()) if getattr(each, "quantization_config", None)]
    stored_as = holders[0].quantization_config if holders else None
    for holder in holders:
        if getattr(holder, "quantization_config", None):
            del holder.quantization_config
    if stored_as is None:
        return Packing(config.storage, None, device, dtype) if config.storage.type != DENSE else None
    stored_as = stored_as if isinstance(stored_as, dict) else stored_as.to_dict()
    method = stored_as.get("quant_method", "unknown")
    if config.storage.type != DENSE:
        raise ModelError(
            f"{config.path} is quantized already (config.json: quantization_config.quant_method is {method!r}), and "
            f"model.storage: {config.storage.type} would quantize it twice: leave model.storage out to train on it as "
            "it is, or give the original 16-bit checkpoint"
        )
    if train_all:
        raise ModelError(
            f"{config.path} is quantized ({method}), so its own weights cannot be trained: give the original 16-bit "
            "checkpoint, or train an adapter (tuning: adapter)"
        )
    return Packing(None, reader_for(stored_as), device, dtype)


def _not_packed(model: Any) -> str | None:
    """What one might expect to be packed and is not: experts that are no module of transformers' interface."""
    experts = kept_dense(model).get("fused experts")
    if not experts:
        return None
    kinds = {
        type(model.get_submodule(name.rpartition(".")[0])).__name__
        for name, parameter in model.named_parameters()
        if "expert" in name and not name.endswith((".weight", "bias")) and parameter.ndim > 1
    }
    return (
        f"the experts of this mixture ({', '.join(sorted(kinds))}) are fused parameters that are not packed: "
        f"{experts / 1e9:.3g} GB of them stay in the run's dtype"
    )


def _not_used(names: list[str]) -> str | None:
    if not names:
        return None
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"the checkpoint has tensors this model has no place for; they are not used ({len(names)}): {shown}"

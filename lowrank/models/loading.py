"""From a folder or a hub name to a `Base` that is known to work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from lowrank.errors import LowrankError, ModelError, raise_all
from lowrank.models import depths, rope
from lowrank.models.base import Base
from lowrank.models.checkpoint_files import checkpoint_files, stored_tensors
from lowrank.models.config import Config, FreezeConfig
from lowrank.models.continuation import what_breaks
from lowrank.models.freezing import train_only
from lowrank.models.leak import check_head, choose_layout
from lowrank.models.lean import make_lean
from lowrank.models.prequantised import reader_for
from lowrank.models.quantised_copies import find_copy
from lowrank.models.quiet import quiet_transformers
from lowrank.models.recompute import set_recompute
from lowrank.models.rope import stretch
from lowrank.models.storages.dense import Config as Dense
from lowrank.models.streaming import Packing, kept_dense, load_packed

DENSE = "dense"
"""The storage that leaves weights as they are."""
TINY = "lowrank/tiny"
"""The name of the base that ships with the package."""


def locate(path: str) -> str:
    """The folder of a packaged model, or `path` as it is."""
    return str(Path(__file__).parent / "tiny") if path == TINY else path


def load_tokenizer(config: Config) -> Any:
    """The model's tokenizer. Needs no weights, so data can be checked before a model loads."""
    with quiet_transformers():
        try:
            return transformers.AutoTokenizer.from_pretrained(
                locate(config.path), revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(_cannot_load("the tokenizer", config, error)) from error


def choose_device(config: Config) -> torch.device:
    """The device the settings ask for; `auto` is the GPU if there is one."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ModelError(f"model.device: {config.device!r} is not a device; cpu, cuda, cuda:1, auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device: this machine has no CUDA device that torch can use; say cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"model.device: {config.device} is not there; this machine has {torch.cuda.device_count()}")
    if device.type not in ("cpu", "cuda", "mps") or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise ModelError(f"model.device: {config.device!r} cannot be used here; say cpu or auto")
    return device


def choose_dtype(config: Config, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it faster, else float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def load(
    config: Config,
    *,
    tokenizer: Any = None,
    train_all: bool = False,
    freeze: FreezeConfig | None = None,
    notify: Callable[[str], None] = print,
) -> Base:
    """Load, freeze, test. `notify` receives what a person should know. `train_all`: the base's own parameters are
    trained, or those that `freeze` chooses.

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
    copy = None if config.storage.type == DENSE else _copy_of(config, dtype)
    model, said = _load_model(copy or config, dtype, device, train_all)
    if copy is not None:
        model.config.name_or_path = locate(config.path)
        said.insert(0, f"reading {copy.path}, which `lowrank quantize` made of {config.path}")
    for sentence in said:
        notify(sentence)
    model.to(device)
    model.requires_grad_(train_all)
    if train_all and freeze is not None:
        train_only(model, freeze)
    model.eval()  # also in training: dropout of the base would tie jobs together
    if config.lean:
        make_lean(model)
    base = Base(model, tokenizer, config.path, config.revision)
    check_head(base)
    word = choose_layout(base, config.attention)
    if word:
        notify(word)
    if config.shift_attn is not None:
        _shift_attention(base, config.shift_attn, word)
    _convert(base, config, word, train_all)
    set_recompute(model, config.recompute)
    return base


def _shift_attention(base: Base, group: int, why_padded: str | None) -> None:
    if base.layout != "packed":
        raise ModelError(
            "model.shift_attn: groups of tokens are told to the attention as documents are, which this base cannot be "
            f"told ({why_padded or 'model.attention: padded'}); leave shift_attn out"
        )
    base.shift_attn = group


def _convert(base: Base, config: Config, why_padded: str | None, train_all: bool) -> None:
    """After the tests of the plain model: put depth routers on it, if they are asked for or saved with it."""
    if config.mixture_of_depths is None and getattr(base.model.config, depths.KEY, None) is None:
        return
    if train_all and base.dtype == torch.float16:
        raise ModelError(
            "model.mixture_of_depths: float16 gradients are scaled, and the predictors' would not be; set model.dtype: "
            "bfloat16"
        )
    if base.steady_length is not None:
        raise ModelError(
            "model.mixture_of_depths: this base stretches its rotary embedding by a text's length, so long texts are "
            "answered by transformers, which has no such layers; take another base"
        )
    if base.layout != "packed":
        raise ModelError(
            "model.mixture_of_depths: layers are given fewer tokens of each document, and this base cannot be told "
            f"where those begin ({why_padded or 'model.attention: padded'})"
        )
    stored = stored_tensors(checkpoint_files(locate(config.path), config.revision))
    base.depths = depths.attach(base.model, config.mixture_of_depths, stored)
    assert base.depths is not None
    for router in base.depths.routers.values():
        router.requires_grad_(train_all)
    apart = what_breaks(base)
    if apart is not None:
        raise ModelError(f"model.mixture_of_depths: this base cannot be converted: {apart}")


def _copy_of(config: Config, dtype: torch.dtype) -> Config | None:
    """The same model as `lowrank quantize` has written it, packed as `config` asks; None if it has not."""
    copy = find_copy(locate(config.path), config.revision, config.storage, dtype)
    return copy and config.model_copy(update={"path": str(copy), "revision": None, "storage": Dense()})


def _load_model(config: Config, dtype: torch.dtype, device: torch.device, train_all: bool) -> tuple[Any, list[str]]:
    """The model, and sentences about what in the checkpoint has no place in it and what of it is not packed."""
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    path = locate(config.path)
    packing = None
    with quiet_transformers():
        try:
            shape = transformers.AutoConfig.from_pretrained(path, **options)
            stretch(shape, config.rope_scaling)
            if config.storage.type != DENSE and (config.mixture_of_depths or getattr(shape, depths.KEY, None)):
                raise ModelError(
                    "model.mixture_of_depths: packed weights are not trained, as those of a mixture of depths have to "
                    "be; leave model.storage out"
                )
            packing = _packing(config, shape, dtype, device, train_all)
            if packing:
                model, report = load_packed(path, packing, shape, **options)
            else:
                loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
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
        except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
            raise ModelError(_cannot_load("the model", config, error)) from error
    problems = [f"{name}: not in the checkpoint" for name in sorted(report["missing_keys"])]
    problems += [
        f"{name}: shape {tuple(saved)} in the checkpoint, {tuple(wanted)} in the model"
        for name, saved, wanted in sorted(report["mismatched_keys"])
    ]
    problems += packing.problems if packing else []
    raise_all(ModelError, f"{config.path}: the checkpoint does not fill the model", problems)
    if model.get_output_embeddings() is None:
        raise ModelError(f"{config.path}: {type(model).__name__} has no language-model head")
    if dtype == torch.float64:  # grouped expert kernels know no float64
        model.config._experts_implementation = "eager"
    spare = [name for name in sorted(report["unexpected_keys"]) if f".{depths.ROUTER}." not in name]
    said = [_not_used(spare), _not_packed(model) if packing else None]
    said += [packing.reader.notice] if packing and packing.reader else []
    said += [rope.said(shape, config.rope_scaling)] if config.rope_scaling else []
    return model, [sentence for sentence in said if sentence]


def _packing(config: Config, shape: Any, dtype: torch.dtype, device: torch.device, train_all: bool) -> Packing | None:
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
            f"{config.path} is quantised already (config.json: quantization_config.quant_method is {method!r}), and "
            f"model.storage: {config.storage.type} would quantise it twice: leave model.storage out to train on it as "
            "it is, or give the original 16-bit checkpoint"
        )
    if train_all:
        raise ModelError(
            f"{config.path} is quantised ({method}), so its own weights cannot be trained: give the original 16-bit "
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


def _cannot_load(what: str, config: Config, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    hints = []
    folder = Path(locate(config.path))
    if folder.is_dir() and list(folder.glob("*.bin")) and not list(folder.glob("*.safetensors")):
        hints.append("it has only pickled .bin weights, which lowrank does not open: convert them to safetensors")
    elif not folder.exists():
        hints.append("no such folder here; if it is a hub name, check the spelling and the network")
    elif folder.is_dir() and "tokenizer" in what and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        hints.append("the folder has no tokenizer (tokenizer.json, tokenizer_config.json): is it a model's folder?")
    if isinstance(error, SafetensorError):
        hints.append("a weight file is damaged or was not downloaded to its end: get it again")
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        hints.append("it comes with its own Python code: read it, then set model.trust_remote_code: true")
    return "\n  ".join([f"cannot load {what} of {config.path!r}: {reason}", *hints])

"""Load a model whose linear layers are packed as they arrive: never more than one of them in 16 bit at a time.

transformers does the loading: which tensor goes where, under which name, fused or split, tied or not, is its business.
We give it lazy tensors, and a quantizer (its own extension point) that packs each weight the moment it is read. Both
kinds of packed base come this way: one we quantize (model.storage), and one that is stored quantized
(models/prequantized), whose packed tensors travel as one lazy weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank.errors import LowrankError, ModelError
from lowrank.models.fused_experts import Joined
from lowrank.models.layers import is_outside, language_model
from lowrank.models.loading.checkpoint_files import StoredTensor, checkpoint_files, stored_tensors
from lowrank.models.loading.expert_loading import (
    ExpertsToPack,
    experts_to_pack,
    one_by_one,
    pack_matrix,
    parameters_to_pack,
    with_packed_experts,
)
from lowrank.models.loading.layers_arriving import LayersArriving, put_packed
from lowrank.models.loading.lazy_weights import PackedWeight, as_weights
from lowrank.models.loading.model_class import model_class
from lowrank.models.plain_linear import is_plain_linear
from lowrank.models.prequantized import PrequantizedReader
from lowrank.models.storages import StorageConfig
from lowrank.models.storages.packed import QuantizedStorage, is_skipped, weight_of

METHOD = "lowrank"
"""Our name among transformers' quantizers."""


class Packing(QuantizationConfigMixin):
    """What transformers hands to its quantizer: how to pack (`storage` or `reader`), and what came of it."""

    def __init__(
        self,
        storage: StorageConfig | None,
        reader: PrequantizedReader | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.quant_method: Any = METHOD
        self.storage, self.reader, self.device, self.dtype = storage, reader, device, dtype
        self.layers_arriving: LayersArriving | None = None
        """Told of decoder layers as they are complete."""
        self.stored: dict[str, StoredTensor] = {}
        """What the files hold."""
        self.tensors: dict[str, Any] = {}
        """The same as transformers is to see it; filled once there is a model to compare it with."""
        self.linears: dict[str, nn.Module] = {}
        """Layers that are packed, if their weight turns out to be."""
        self.packed: dict[str, nn.Module] = {}
        self.experts: dict[str, ExpertsToPack] = {}
        """Fused parameters by full name, and what of them is packed."""
        self.modules_of_experts: dict[str, Any] = {}
        self.problems: list[str] = []

    def __deepcopy__(self, memo: Any) -> Packing:
        return self  # transformers copies configurations, and this one holds the files

    def to_dict(self) -> dict[str, Any]:
        """Nothing of it is for a file."""
        return {"quant_method": METHOD}

    def pack(self, name: str, value: Any) -> torch.Tensor | None:
        """Take the weight of linear `name`: None if it is packed now, the tensor if it stays as it is."""
        linear = self.linears[name]
        try:
            if isinstance(value, PackedWeight):
                bias = getattr(linear, "bias", None)
                real = isinstance(bias, torch.Tensor) and not bias.is_meta
                module = value.build(bias if real else None, leave=self._is_placed(name))
                got, wanted = (module.out_features, module.in_features), tuple(weight_of(linear).shape)
                if got != wanted:
                    self.problems.append(f"{name}: {got} (out, in) in the checkpoint, {wanted} in the model")
                self.packed[name] = module
                return None
            empty = linear.weight
            assert isinstance(empty, nn.Parameter)
            if value.shape != empty.shape:
                shapes = f"shape {tuple(value.shape)} in the checkpoint, {tuple(empty.shape)} in the model"
                self.problems.append(f"{name}.weight: {shapes}")
                return None
            if self.storage is None:
                return value
            linear.weight = nn.Parameter(value.to(self.device), requires_grad=False)
            self.packed[name] = self.storage.wrap(linear)
            linear.weight = empty
        except LowrankError as error:
            self._remember(name, error)
        return None

    def pack_expert(self, name: str, index: int, value: Any) -> None:
        """Take one expert's matrix of the fused parameter `name`: as the parameter has it, or packed in one or more
        parts."""
        wanted = self.experts[name]
        try:
            if isinstance(value, list):
                if any(isinstance(part, torch.Tensor) for part in value):
                    raise ModelError(f"{name}: expert {index} is quantized in part; take the 16-bit checkpoint")
                parts = [part.build(None, leave=self._is_placed(name)) for part in value]
                module = parts[0] if len(parts) == 1 else Joined(parts)
            else:
                assert self.storage is not None
                weight = value.to(self.device)
                module = pack_matrix(self.storage, weight.t() if wanted.transposed else weight)
            got = (module.out_features, module.in_features)
            if got != wanted.shape:
                self.problems.append(
                    f"{name}: expert {index} is {got} (out, in) in the checkpoint, {wanted.shape} in the model"
                )
            wanted.packed[index] = module
        except LowrankError as error:
            self._remember(name, error)

    def pack_fused(self, name: str, value: Any) -> Any:
        """Take a fused parameter that is stored whole: None if it is packed now, else what is to be set."""
        if self.storage is None:
            return value
        wanted = self.experts[name]
        rows, columns = reversed(wanted.shape) if wanted.transposed else wanted.shape
        if tuple(value.shape) != (wanted.count, rows, columns):
            expected = f"{(wanted.count, rows, columns)} in the model"
            self.problems.append(f"{name}: shape {tuple(value.shape)} in the checkpoint, {expected}")
            return None
        for index in range(wanted.count):
            self.pack_expert(name, index, value[index])
        return None

    def is_there(self, model: Any, target: str, missing_keys: set[str]) -> None:
        """Nothing is to be loaded for this parameter any more."""
        missing_keys.discard(target)
        model.get_parameter(target)._is_hf_initialized = True  # or it would be drawn at random

    def _is_placed(self, name: str) -> bool:
        """Whether it is in a decoder layer that is handed on, to be put somewhere."""
        return self.layers_arriving is not None and self.layers_arriving.waits_for(name)

    def _remember(self, name: str, error: LowrankError) -> None:
        self.problems.append(str(error) if name in str(error) else f"{name}: {error}")


class _Quantizer(HfQuantizer):
    """transformers' extension point. Always on the fly in its eyes, also where the packing was done long ago."""

    quantization_config: Any

    def preprocess_model(self, model: Any, dtype: Any = None, **options: Any) -> None:
        """The model is on the meta device."""
        packing: Packing = self.quantization_config
        if packing.layers_arriving is not None:
            packing.layers_arriving.begin(model)
        if packing.storage is None and packing.reader is None:
            packing.tensors.update(as_weights(packing, packing.stored, model))
            return
        packing.linears.update(linears_to_pack(model, packing.storage))
        packing.modules_of_experts.update(experts_to_pack(model, packing.storage))
        packing.experts.update(parameters_to_pack(packing.modules_of_experts))
        packing.tensors.update(as_weights(packing, packing.stored, model))

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        """Whether `pack` is asked about it."""
        name, _, kind = param_name.rpartition(".")
        packing: Packing = self.quantization_config
        return param_name in packing.experts or (kind == "weight" and name in packing.linears)

    def get_quantize_ops(self) -> ConversionOps:
        """What the loader calls with each such weight."""
        return _Pack(self.quantization_config)

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """The model's own, expert by expert."""
        experts = self.quantization_config.experts
        if not experts:
            return weight_conversions
        return one_by_one(weight_conversions, sorted({name.rpartition(".")[2] for name in experts}))

    def postprocess_model(self, model: Any, **options: Any) -> Any:
        """Everything is read: the packed layers take their places, and no trace of us stays with the model."""
        packing: Packing = self.quantization_config
        if packing.layers_arriving is not None:
            packing.layers_arriving.look(packing, at_the_end=True)
        put_packed(packing, model)
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> Any:
        """Not by transformers."""
        return False

    @property
    def is_trainable(self) -> Any:
        """Adapters on it are; transformers is not asked."""
        return False


class _Pack(ConversionOps):
    def __init__(self, packing: Packing) -> None:
        self.packing = packing

    def convert(self, input_dict: dict[str, Any], *args: Any, **options: Any) -> dict[str, Any]:
        """Packs what is to be, and returns the rest for the loader to set."""
        rest = {}
        for target, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            name, _, kind = target.rpartition(".")
            if target in self.packing.experts:
                value = self.packing.pack_fused(target, value)
            elif kind == "weight" and name in self.packing.linears:
                value = self.packing.pack(name, value)
            if value is None:
                self.packing.is_there(options["model"], target, options["missing_keys"])
            else:
                rest[target] = value
        return rest


def linears_to_pack(model: Any, storage: StorageConfig | None) -> dict[str, nn.Module]:
    """Linear layers that are no head, not tied, and not to be skipped. `storage` None: whatever may be packed."""
    language = "" if not isinstance(storage, QuantizedStorage) or storage.towers else language_model(model)[0]
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    kept = {name.removesuffix(".weight") for pair in tied.items() for name in pair}
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and is_plain_linear(type(module))
        and module is not head
        and name not in kept
        and not is_skipped(name, storage)
        and not is_outside(name, language)
    }


def pack_in_place(model: Any, storage: StorageConfig) -> None:
    """Pack the layers of a model that is in memory already, the same ones as loading packs."""
    if storage.type != "dense":
        for name, linear in linears_to_pack(model, storage).items():
            model.set_submodule(name, storage.wrap(linear))
        experts = experts_to_pack(model, storage)
        wanted = parameters_to_pack(experts)
        for name, found in wanted.items():
            for index, weight in enumerate(model.get_parameter(name).detach()):
                found.packed[index] = pack_matrix(storage, weight.t() if found.transposed else weight)
        with_packed_experts(model, experts, wanted)


def load_packed(
    path: str, packing: Packing, config: Any, *, revision: str | None, trust_remote_code: bool
) -> tuple[Any, dict[str, Any]]:
    """`from_pretrained` with `packing`: the model, and transformers' report.

    Raises what from_pretrained raises, and ModelError for damaged files. Tensors that do not fit are listed in
    `packing.problems`.
    """
    AUTO_QUANTIZER_MAPPING[METHOD] = _Quantizer  # pyright: ignore[reportArgumentType] (transformers names its own)
    packing.stored = stored_tensors(checkpoint_files(path, revision))
    with torch.device("meta"):
        kind = type(model_class(config).from_config(config, trust_remote_code=trust_remote_code))
    model, report = kind.from_pretrained(
        None,
        config=config,
        dtype=packing.dtype,
        quantization_config=packing,
        state_dict=packing.tensors,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are listed by the caller, all at once
    )
    errors = report.get("conversion_errors") or {}
    assert not errors, "\n".join(errors.values())
    model.config.name_or_path = path
    return model, report


def kept_dense(model: Any) -> dict[str, int]:
    """Bytes of matrices that are not packed, by kind: embedding and head, fused experts, other layers."""
    kinds: dict[str, int] = {}
    embeddings = {id(each.weight) for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        kind = "fused experts" if "expert" in name and not name.endswith((".weight", "bias")) else "other layers"
        kind = "embedding and head" if id(parameter) in embeddings else kind
        kinds[kind] = kinds.get(kind, 0) + parameter.numel() * parameter.element_size()
    return kinds

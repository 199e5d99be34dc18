"""A frozen base in parts, one on each device, by torch's FSDP2 (`fully_shard`).

Each decoder layer is one group: gathered before it computes, forward and backward, and let go of afterwards; while one
computes the next is on its way. The embedding is a group, and the head, which is gathered around the loss. What is
trained lies in the bank, outside these modules, so FSDP sees frozen parameters alone, and reduces nothing.

Packed weights are parameters of integers here, which a gather moves as bytes. Neither the shapes of products nor the
values of weights depend on how many devices hold them, so the results are the bits of an unsharded base.

    mesh of one dimension      the base once, over all ranks
    two: replicate, shard      once on each group of `shard_size` ranks, as a rule a machine
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lowrank.errors import ModelError
from lowrank.models.placement import Reading, all_read, unread, with_own_linears


class Sharded:
    """See Placement. Every call is made by all ranks, in the same order."""

    moves_layers = shares_head = in_step = True

    def __init__(self, device: torch.device, world: int, shard_size: int, offload: bool = False) -> None:
        """The process group is there. `shard_size` divides `world`. `offload`: parts wait in pinned host memory."""
        # Of adapters whose hidden states are a part of a longer tensor; nobody here changes them in place.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
        self.device = device
        self._mesh = _mesh(device.type, world, shard_size)
        self._policy = CPUOffloadPolicy() if offload else OffloadPolicy()
        self._layers: dict[str, FSDPModule] = {}
        self._head: FSDPModule | None = None
        """What holds the head's weight: the head, or the embedding that it is tied to."""
        self._head_tensors: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def keep(self, layer: nn.Module) -> None:
        """See Placement: this rank's part of it."""
        with_own_linears(layer)
        _packed_as_parameters(layer)
        if not packs_integers() and not all(each.is_floating_point() for each in layer.parameters()):
            raise ModelError(  # of a checkpoint that comes quantized, which settings do not say
                f"this base's packed weights cannot be cut in parts by torch {torch.__version__}; `pip install "
                "'torch>=2.12'`, or set base: replicated"
            )
        self._shard(layer)
        self._read_parts(layer)

    def finish(self, model: Any, backbone: nn.Module, layers: nn.ModuleList) -> None:
        """See Placement: embedding and head are cut too, and what is around them joins the groups, so that one fetches
        the next while it computes. Towers beside the language model stay whole."""
        names = {module: name for name, module in model.named_modules()}
        self._layers = {f"{names[layer]}.": layer for layer in layers if isinstance(layer, FSDPModule)}
        assert len(self._layers) == len(layers), "every layer was kept"
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        holder = embedding if head.weight is embedding.weight else head
        if holder is embedding:
            model.set_submodule(names[head], _TiedHead(head, embedding, self))
        for module in {embedding, holder}:
            self._shard(module)
        around = _around(backbone, {embedding, *layers})
        _packed_as_parameters(around)
        fully_shard(around, mesh=self._mesh, offload_policy=self._policy)
        embedding.register_forward_hook(_grow_from_here)
        self._head = holder
        with self.head():
            bias = getattr(model.get_output_embeddings(), "bias", None)
            self._head_tensors = (holder.weight, bias)

    def _shard(self, module: nn.Module) -> None:
        fully_shard(module, mesh=self._mesh, reshard_after_forward=True, offload_policy=self._policy)

    def _read_parts(self, layer: nn.Module) -> None:
        """What is unread is on the meta device, of which FSDP cuts shapes; it takes its part as from a state dict."""
        shard = self._mesh["shard"]
        parts: dict[str, torch.Tensor] = {}
        for name, module in layer.named_modules():
            for own, stored in unread(module).items():
                cut: Any = getattr(module, own)
                local, rows = cut.to_local(), cut.shape[0]
                first = min(shard.get_local_rank() * -(-rows // shard.size()), rows)
                row_bytes = stored.nbytes // rows
                read = stored.part(first * row_bytes, len(local) * row_bytes).view(local.dtype).view(local.shape)
                parts[f"{name}.{own}"] = DTensor.from_local(
                    read.to(self.device),
                    cut.device_mesh,
                    cut.placements,
                    run_check=False,
                    shape=cut.shape,
                    stride=cut.stride(),
                )
        if parts:
            found: Any = layer.load_state_dict(parts, strict=False, assign=True)
            assert not found.unexpected_keys, "each has the name of a parameter"
        all_read(layer)

    @contextmanager
    def reading(self) -> Generator[Reading]:
        """See Placement: the layer of each name is gathered, and let go of when another's follows."""
        gathered: FSDPModule | None = None

        def read(name: str) -> None:
            nonlocal gathered
            wanted = next((layer for prefix, layer in self._layers.items() if name.startswith(prefix)), None)
            if wanted is not gathered:
                if gathered is not None:
                    gathered.reshard()
                if wanted is not None:
                    wanted.unshard()
                gathered = wanted

        try:
            yield read
        finally:
            if gathered is not None:
                gathered.reshard()

    @contextmanager
    def head(self) -> Generator[None]:
        """See Placement."""
        assert self._head is not None
        self._head.unshard()
        try:
            yield
        finally:
            self._head.reshard()

    def head_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """See Placement. FSDP gives a gathered parameter the same tensor each time."""
        return self._head_tensors


def _around(module: nn.Module, parts: set[nn.Module]) -> nn.Module:
    """The smallest module that has all of `parts` in it: what every forward pass calls, by whichever way."""
    inside = next((child for child in module.children() if parts <= set(child.modules())), None)
    return module if inside is None else _around(inside, parts)


def packs_integers() -> bool:
    """Whether this torch cuts parameters of integers, which packed weights are."""
    major, minor = (int(each) for each in torch.__version__.split(".")[:2])
    return (major, minor) >= (2, 12)


def _mesh(device_type: str, world: int, shard_size: int) -> DeviceMesh:
    if shard_size == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    shape = (world // shard_size, shard_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def _packed_as_parameters(module: nn.Module) -> None:
    """FSDP leaves buffers as they are, on every rank; packed weights are such."""
    for each in module.modules():
        if not hasattr(each, "dense_weight"):
            continue
        for name, buffer in list(each.named_buffers(recurse=False)):
            if buffer.ndim and buffer.numel() > 1:
                delattr(each, name)
                each.register_parameter(name, nn.Parameter(buffer.contiguous(), requires_grad=False))


def _grow_from_here(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """A hook: gradients go back to the embedding's output whatever is trained above. So every layer has a backward pass
    in every pass of every rank, whichever adapters its documents have, and the ranks' gathers are the same."""
    del module, args
    if not torch.is_grad_enabled() or output.requires_grad:
        return output
    return output.detach().requires_grad_().clone()


class _TiedHead(nn.Module):
    """A head whose weight is the embedding's, and which is no parameter of its own."""

    def __init__(self, head: Any, embedding: Any, placement: Sharded) -> None:
        super().__init__()
        self.bias = head.bias
        self.in_features, self.out_features = head.in_features, head.out_features
        self._of = (embedding, placement)  # in a tuple: it is no child

    @property
    def weight(self) -> torch.Tensor:
        """(V, D); its values are there inside `Placement.head`."""
        return self._of[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V). Without gradients: losses are computed outside the model."""
        with self._of[1].head():
            return F.linear(x, self.weight, self.bias)

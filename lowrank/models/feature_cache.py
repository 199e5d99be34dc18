"""A cache on disk of what a frozen tower makes of pictures and videos: it looks at those of a document once, over
epochs, jobs and runs.

    CACHE/vision_features/<digest of the tower>/<digest of what it is given>.safetensors

An entry holds the features of the pictures of one document, together as the tower saw them: of several at once it does
not make the bits that it makes of each. Its name is the digest of the very tensors that the tower is given, so sizes,
limits and settings of the processor need no key of their own.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils.generic import ModelOutput

from lowrank.kernels.cache_folder import cache_folder
from lowrank.models.layers import is_outside, language_model

if TYPE_CHECKING:
    from lowrank.models.base import Base

FOLDER = "vision_features"
_FORMAT = "1"


class FeatureCache:
    """The entries of one tower. `notify` is called once for a damaged entry, and once for what cannot be written."""

    def __init__(self, folder: Path, notify: Callable[[str], None]) -> None:
        self.folder = folder
        self._notify = notify
        self._reported: set[str] = set()
        self.read = self.computed = 0

    def features(self, kind: str, given: Mapping[str, torch.Tensor], compute: Callable[[], Any]) -> Any:
        """What `compute` gives for these tensors: read, or computed now and written."""
        path = self.folder / f"{_key(kind, given)}.safetensors"
        device = next(iter(given.values())).device
        found = self._load(path, device)
        if found is not None:
            self.read += 1
            return found
        output = compute()
        self.computed += 1
        self._save(path, output)
        return output

    def describe(self) -> str:
        """What lies on disk, and what this process had of it."""
        sizes = [file.stat().st_size for file in self.folder.glob("*.safetensors")]
        had = f"; {self.computed} computed and {self.read} read in this run" if self.computed or self.read else ""
        return f"cached vision features: {len(sizes)} entries, {sum(sizes) / 1e6:.1f} MB, in {self.folder}{had}"

    def _load(self, path: Path, device: torch.device) -> Any:
        if not path.exists():
            return None
        try:
            return _read(path, device)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._once(f"cached vision features: {path} is damaged ({error}); such entries are computed again")
            return None

    def _save(self, path: Path, output: Any) -> None:
        try:
            _write(path, output)
        except OSError as error:
            self._once(f"cached vision features: {self.folder} cannot be written ({error}); the rest is computed")

    def _once(self, text: str) -> None:
        kind = text.rpartition("; ")[2]
        if kind not in self._reported:
            self._reported.add(kind)
            self._notify(text)


def open_feature_cache(base: Base, notify: Callable[[str], None]) -> FeatureCache:
    """The cache of a base's towers, in the cache folder of the person."""
    return FeatureCache(cache_folder() / FOLDER / tower_digest(base.model), notify)


@torch.no_grad()
def tower_digest(model: Any) -> str:
    """Of everything that a tower's result follows from beside its input: the weights as they lie in memory, the
    configuration, the libraries, and the machine, since the last bits are of its kernels and threads."""
    digest = blake2b(digest_size=16)
    for part in _of_surroundings(model):
        digest.update(f"{part}\0".encode())
    language, head = language_model(model)[0], model.get_output_embeddings()
    for name, module in model.named_modules():
        if not is_outside(name, language) or module is head:
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        digest.update(f"{name} {type(module).__name__} {module.extra_repr()}\0".encode())
        for key, tensor in own:
            _add(digest, key, tensor)
    return digest.hexdigest()


def _of_surroundings(model: Any) -> Iterator[str]:
    settings = model.config.to_dict()
    yield _FORMAT
    yield json.dumps(settings | {"_name_or_path": "", "transformers_version": ""}, sort_keys=True, default=str)
    for module in model.modules():
        yield str(getattr(getattr(module, "config", None), "_attn_implementation", ""))
    device = next(model.parameters()).device
    yield f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}"
    if device.type == "cuda":
        yield f"{torch.cuda.get_device_name(device)} {torch.get_float32_matmul_precision()}"
    else:
        yield f"{device.type} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"


def _key(kind: str, given: Mapping[str, torch.Tensor]) -> str:
    digest = blake2b(kind.encode(), digest_size=20)
    for name in sorted(given):
        _add(digest, name, given[name])
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy())


def _write(path: Path, output: Any) -> None:
    """Beside its place, then renamed: other processes write the same entries."""
    tensors: dict[str, torch.Tensor] = {}
    form = {name: _taken_apart(value, name, tensors) for name, value in output.items() if _is_features(value)}
    kind = type(output)
    about = {"class": [kind.__module__, kind.__qualname__], "form": form, "digest": _digest_of(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(descriptor)
    try:
        save_file(tensors, partial, metadata={"lowrank": json.dumps(about)})
        os.replace(partial, path)
    except SafetensorError as error:  # a full disk, in its words
        raise OSError(str(error)) from error
    finally:
        Path(partial).unlink(missing_ok=True)


def _is_features(value: Any) -> bool:
    """A tensor, or lists of some; no language model takes anything else of a tower."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_is_features(each) for each in value)
    return isinstance(value, torch.Tensor)


def _taken_apart(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The form of a value, with its tensors put aside: a name for each, in lists as they were."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()  # pieces of one tensor share their memory
        return name
    return [_taken_apart(each, f"{name}.{index}", tensors) for index, each in enumerate(value)]


def _read(path: Path, device: torch.device) -> Any:
    """The output that was written. ValueError, or what libraries raise, where the file is not as it was."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["lowrank"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    if _digest_of(tensors) != about["digest"]:
        raise ValueError("its tensors are not those that were written")
    module, name = about["class"]
    kind = getattr(sys.modules[module], name)
    if not (isinstance(kind, type) and issubclass(kind, ModelOutput)):
        raise ValueError(f"{name} is no output of a model")
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return kind(**{name: _put_together(form, moved) for name, form in about["form"].items()})


def _put_together(form: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    return tensors[form] if isinstance(form, str) else [_put_together(each, tensors) for each in form]


def _digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    return _key("features", tensors)

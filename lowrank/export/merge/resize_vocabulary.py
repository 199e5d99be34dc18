"""A base with tokens added to its vocabulary, as a checkpoint of its own: to train on, to merge into, to convert.

Rows that the embedding and the head have too many already (many makers round up) are used first; where there are none,
both grow, and the new rows begin as the mean of the old ones (Hewitt 2021), so that no new token is likelier than
another. Files that nothing changes in are linked, not copied, where the disk allows it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken

from lowrank.checkpoints.atomic import new_folder
from lowrank.checkpoints.model_config import rewrite_config, write_config
from lowrank.errors import ConfigError, ModelError, OutputError, raise_all
from lowrank.export.merge.tensor_names import Names
from lowrank.foreign_files import leads_out, read_json, write_json
from lowrank.models.loading.checkpoint_files import INDEX, CheckpointFiles
from lowrank.models.loading.quiet import quiet_transformers

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class ResizedModel:
    """What came of it."""

    token_ids: tuple[int, ...]
    new_rows: int
    """By which embedding and head grew; 0 where there were rows to spare."""


def add_tokens(
    base: Path, folder: Path, tokens: Sequence[str], special_tokens: Sequence[str], *, trust_remote_code: bool = False
) -> ResizedModel:
    """Write the checkpoint in `base` with more tokens to `folder`, whole or not at all.

    `special_tokens` are left out of decoded text. Raises ConfigError for tokens that are there already, OutputError,
    and ModelError for weights that cannot grow.
    """
    if folder.exists():
        raise OutputError(f"{folder} exists already: name another folder with -o, or remove it")
    with quiet_transformers():
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    known = tokenizer.get_vocab()
    given = [*tokens, *special_tokens]
    problems = [f"{token!r} is a token already, number {known[token]}" for token in given if token in known]
    problems += [f"{token!r} is named twice" for token in dict.fromkeys(given) if given.count(token) > 1]
    problems += [f"{token!r} is blank" for token in given if not token.strip()]
    problems += [] if given else ["name at least one token"]
    raise_all(ConfigError, "these tokens cannot be added", problems)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens], True)
    ids = tuple(tokenizer.convert_tokens_to_ids(given))

    checkpoint = CheckpointFiles(base)
    growing = _growing(Names(base, checkpoint, trust_remote_code=trust_remote_code), checkpoint, max(ids) + 1)
    with new_folder(folder) as partial:
        changed = {checkpoint[name].file.name for name in growing}
        files = [path for path in sorted(base.iterdir()) if path.is_file() and not path.name.startswith(".")]
        out = [path.name for path in files if leads_out(path, base)]
        raise_all(ModelError, f"{base}: links that lead out of this folder would be taken along", out)
        for path in files:
            if path.name not in changed:
                _link(path, partial / path.name)
        for name in changed:
            _write_grown(checkpoint, base / name, partial / name, growing)
        _write_configs(checkpoint, partial, growing)
        with quiet_transformers():
            tokenizer.save_pretrained(partial)
    return ResizedModel(ids, max(growing.values(), default=0))


def _growing(names: Names, checkpoint: CheckpointFiles, needed: int) -> dict[str, int]:
    """How many rows each tensor of the files gets more: of the embedding, and of the head where it is another."""
    model = names.model
    wanted: list[str] = []
    state = model.state_dict(keep_vars=True)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        wanted += [name for name, parameter in state.items() if id(parameter) in own]
    growing: dict[str, int] = {}
    for parameter in wanted:
        try:
            file_name = names.origin(parameter)
        except StopIteration as error:
            raise ModelError(
                f"{parameter} is not in the checkpoint as it is (quantized?), so it cannot grow: add the tokens to the "
                "16-bit checkpoint"
            ) from error
        more = needed - checkpoint[file_name].shape[0]
        if more > 0:
            growing[file_name] = more
    return growing


def _mean(checkpoint: CheckpointFiles, name: str) -> torch.Tensor:
    """Of all rows, (D) or a scalar, in the tensor's dtype."""
    entry = checkpoint[name]
    total = torch.zeros(entry.shape[1:], dtype=torch.float64)
    for first in range(0, entry.shape[0], _ROWS_AT_ONCE):
        total += entry.rows(first, min(first + _ROWS_AT_ONCE, entry.shape[0])).double().sum(0)
    return (total / entry.shape[0]).to(entry.dtype)


def _write_grown(checkpoint: CheckpointFiles, source: Path, target: Path, growing: dict[str, int]) -> None:
    """One weight file, with the tensors that grow in it."""
    tensors = {}
    for name, entry in checkpoint.items():
        if entry.file.name == source.name:
            tensors[name] = entry.read()
            if name in growing:
                mean = _mean(checkpoint, name)
                tensors[name] = torch.cat([tensors[name], mean.expand(growing[name], *mean.shape)])
    save_file(tensors, target, metadata={"format": "pt"})


def _write_configs(checkpoint: CheckpointFiles, folder: Path, growing: dict[str, int]) -> None:
    """config.json and the index of the weight files, as they are now."""
    if not growing:
        rewrite_config(folder)
        return
    rows = {checkpoint[name].shape[0] + more for name, more in growing.items()}
    assert len(rows) == 1, "embedding and head had different numbers of rows"
    config = read_json(folder / "config.json")
    for part in (config, *config.values()):
        if isinstance(part, dict) and "vocab_size" in part:
            part["vocab_size"] = max(rows)
    write_config(folder, config)
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        for name, more in growing.items():
            described = index.setdefault("metadata", {})
            described["total_size"] = (
                described.get("total_size", 0) + more * checkpoint[name].nbytes // checkpoint[name].shape[0]
            )
        write_json(folder / INDEX, index)


def _link(path: Path, target: Path) -> None:
    """Weights are linked; what somebody may edit is copied."""
    if path.name.endswith(_WEIGHTS):
        try:
            os.link(path.resolve(), target)
            return
        except OSError:  # another disk, or one without links
            pass
    shutil.copyfile(path, target)

"""What Unsloth's models save, written by our exports: each is read back and compared with what was trained."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from lowrank.checkpoints.atomic import new_file
from lowrank.checkpoints.peft_layout import CONFIG_FILE, write_adapter
from lowrank.compat.unsloth.arguments import hub_token, warn_once
from lowrank.errors import ConfigError, NotTheSameError, OutputError, did_you_mean, raise_all
from lowrank.export.gguf.convert import PLAIN_TYPES
from lowrank.export.gguf.mixes import BASES
from lowrank.export.publish.hub import check_push, push_folder
from lowrank.export.targets.gguf import GGUFExportConfig
from lowrank.export.targets.merged import MergedExportConfig
from lowrank.export.targets.merged_4bit import Merged4bitExportConfig
from lowrank.models.loading.pretrained import locate
from lowrank.pipelines.export import export_targets
from lowrank.pipelines.export_checks import ExportRequest
from lowrank.pipelines.export_source import open_source
from lowrank.third_party import code_allowed

NO_SUCH_METHOD = {
    "mxfp4": "gpt-oss's own 4-bit form is read, not written; choose merged_16bit",
    "torchao": "torchao's forms are not written; choose merged_4bit or a GGUF type",
    "fp8": "8-bit floats are not written; choose merged_16bit",
}
"""What Unsloth writes and this does not, with the way out."""
GGUF_TYPES = {"not_quantized": "bf16", "fast_quantized": "q8_0", "quantized": "q4_k_m"}
"""Unsloth's own words."""
_HARMLESS: Mapping[str, Any] = {
    "state_dict": None, "is_main_process": True, "safe_serialization": True, "save_function": torch.save,
    "selected_adapters": None, "push_to_hub": False, "max_shard_size": "5GB", "variant": None, "first_conversion": None,
    "save_embedding_layers": "auto", "save_peft_format": True, "save_method": None, "imatrix_file": None,
    "calibration_dataset": None,
}  # fmt: skip
"""Arguments of Unsloth, transformers and PEFT that say what happens anyway; None asks for nothing in any of them."""
_UNHEARD = ("token", "private", "use_temp_dir", "temporary_location", "maximum_memory_usage", "num_calibration_samples",
            "max_seq_length", "merge_is_disposable")  # fmt: skip
"""Taken with any value: they say how files are written, or belong to what another argument would ask for."""
_OF_THE_CARD = ("tags", "datasets")
"""Taken, and said to have no effect."""
_OF_UPLOADS = ("commit_message", "commit_description", "revision", "create_pr")
_LOG = logging.getLogger(__name__)


def save_lora(model: Any, folder: Path, tokenizer: Any = None, **others: Any) -> None:
    """The adapter at work, in PEFT's layout, beside whatever else is in `folder`."""
    _refuse("save_pretrained", others)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        write_adapter(Path(partial), model.on_disk(), model.description)
        for path in Path(partial).iterdir():
            with new_file(folder / path.name) as place:
                os.replace(path, place)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_merged(
    model: Any,
    folder: Path,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    verify: bool = True,
    **others: Any,
) -> None:
    """`save_method`: merged_16bit, merged_4bit (bitsandbytes' nf4) or lora.

    What is in `folder` stays, but for files of those names and the weights of another merged model. `verify` reads what
    was written back and compares it with what was trained: NotTheSameError if it is another model, a warning where 4
    bits cost more than they should. ConfigError for anything else that is asked.
    """
    if save_method == "lora":
        if not hasattr(model, "on_disk"):
            raise ConfigError("save_method='lora': all weights were trained, there is no adapter; choose merged_16bit")
        save_lora(model, folder, tokenizer, **others)
        return
    shard = others.get("max_shard_size", "5GB")
    _refuse("save_pretrained_merged", {**others, "max_shard_size": "5GB"})
    if save_method == "merged_16bit":
        _write(model, folder, tokenizer, MergedExportConfig(dtype=_sixteen_bits(model), max_shard_size=shard), verify)
    elif save_method in ("merged_4bit", "merged_4bit_forced"):
        _write(model, folder, tokenizer, Merged4bitExportConfig(calibrate=False, max_shard_size=shard), verify)
    elif save_method in NO_SUCH_METHOD:
        raise ConfigError(f"save_method={save_method!r}: {NO_SUCH_METHOD[save_method]}")
    else:
        raise ConfigError(f"save_method={save_method!r}: expected merged_16bit, merged_4bit or lora")


def save_gguf(
    model: Any,
    folder: Path,
    tokenizer: Any = None,
    quantization_method: str | list[str] | tuple[str, ...] = "fast_quantized",
    verify: bool = True,
    **others: Any,
) -> None:
    """`quantization_method`: llama.cpp's types (q8_0, q4_k_m, f16 ...), one or several, or Unsloth's words for some.

    With `verify`, a warning says where a file differs from base + adapter more than its type should cost.
    """
    _refuse("save_pretrained_gguf", others)
    methods = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
    types = tuple(GGUF_TYPES.get(name.lower(), name.lower()) for name in methods)
    for name in types:
        check_gguf_type(name)
    _write(model, folder, tokenizer, GGUFExportConfig(types=types), verify)


def check_gguf_type(name: str) -> None:
    """ConfigError for a `quantization_method` that is none."""
    known = {*PLAIN_TYPES, *(each.lower() for each in BASES), *GGUF_TYPES}
    if name.lower() not in known:
        raise ConfigError(f"quantization_method={name!r}: no type of GGUF files{did_you_mean(name, known)}")


def push(save: Callable[..., None], model: Any, repo_id: str, *, token: Any = None, **others: Any) -> dict[str, Any]:
    """Save to a folder of ours, upload it, forget it. `token`: for this call; None or "": that of the environment.

    `commit_message`, `commit_description`, `revision`, `create_pr`: the hub's, of the one commit.
    """
    private = others.pop("private", True)
    dry_run = others.pop("dry_run", False)
    upload = {name: others.pop(name) for name in _OF_UPLOADS if name in others}
    with hub_token(token):
        check_push(repo_id, ["unsloth"], dry_run=dry_run)
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / repo_id.rpartition("/")[2]
            save(model, written, **others)
            return push_folder(written, repo_id, dry_run=dry_run, private=True if private is None else private,
                               **upload)  # fmt: skip


def _write(model: Any, folder: Path, tokenizer: Any, target: Any, verify: bool) -> None:
    tokenizer = tokenizer if tokenizer is not None else own_tokenizer(model)
    _refuse_own_base(model, folder)
    if folder.is_file():
        raise OutputError(f"{folder} is a file; choose a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        trained = Path(beside) / "trained" / folder.name
        _write_trained(model, trained, tokenizer)
        partial = Path(beside) / "written" / folder.name
        with code_allowed(model.settings.trust_remote_code):
            source = open_source(str(trained), notify=_LOG.info)
            result = export_targets(source, [ExportRequest(target, partial)], verify=verify, notify=_LOG.info)
        _move_into(partial, folder)
    own = result["targets"][target.type]
    found = [f"{each['name']}: {problem}" for each in own["comparisons"] for problem in each["problems"]]
    heading = f"{folder} is written and kept, and differs from what was trained more than was to be expected"
    if isinstance(target, (GGUFExportConfig, Merged4bitExportConfig)):  # how much few bits cost depends on the model
        for problem in found:
            _LOG.warning("%s: %s", heading, problem)
    else:
        raise_all(NotTheSameError, heading, found)


def own_tokenizer(model: Any) -> Any:
    """The one it was loaded with."""
    return (vars(model).get("lowrank_base") or model.base).tokenizer


def _write_trained(model: Any, folder: Path, tokenizer: Any) -> None:
    """What was trained, as an export begins with it: an adapter, or the whole model."""
    if hasattr(model, "on_disk"):
        save_lora(model, folder)
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if isinstance(tokenizer.chat_template, str):
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _refuse_own_base(model: Any, folder: Path) -> None:
    """The base is still needed, and may be nobody else's copy."""
    base = Path(locate(model.settings.path)).resolve()
    if base.is_dir() and (folder.resolve() == base or base in folder.resolve().parents):
        raise OutputError(f"{folder} is inside of the base ({base}); choose a folder outside")


def _move_into(written: Path, folder: Path) -> None:
    """The files of a finished export into a folder that may hold others. Weights of a merged model replace those of
    another: both together would be none."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in written.iterdir()}
    if any(name.endswith(".safetensors") for name in names):
        for path in folder.glob("model*.safetensors*"):
            if path.name not in names:
                path.unlink()
        if (folder / CONFIG_FILE).is_file():
            _LOG.warning(
                "%s holds an adapter too: from_pretrained(%r) reads that, on its own base", folder, str(folder)
            )
    for path in sorted(written.iterdir()):
        place = folder / path.name
        if path.is_dir() and place.is_dir():
            shutil.rmtree(place)
        os.replace(path, place)


def _sixteen_bits(model: Any) -> Literal["auto", "bfloat16"]:
    """What the base's files have, if that is a 16-bit type."""
    path = Path(locate(model.settings.path)) / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    described = str(fields.get("dtype", fields.get("torch_dtype", "")))
    return "auto" if described in ("bfloat16", "float16") or not path.is_file() else "bfloat16"


def _refuse(what: str, given: Mapping[str, Any]) -> None:
    for name in _OF_THE_CARD:
        if given.get(name) is not None:
            warn_once(f"{what}: {name} has no effect: the model card says what was trained and how")
    requested = {key: value for key, value in given.items() if key not in (*_UNHEARD, *_OF_THE_CARD)}
    problems = [
        name
        for name, value in requested.items()
        if name not in _HARMLESS or (value is not None and value != _HARMLESS[name])
    ]
    if problems:
        shown = ", ".join(f"{name}={given[name]!r}" for name in problems)
        raise ConfigError(f"{what} cannot honor {shown}; leave it out")

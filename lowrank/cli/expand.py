"""`lowrank expand`: a copy of a model with new layers in it that change nothing yet (LLaMA Pro)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank.cli.shared_options import NewFolder

if TYPE_CHECKING:
    from lowrank.models.config import ModelConfig


def expand(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a 16-bit checkpoint, or a hub name.")],
    num_new: Annotated[int, typer.Option("--num-expand", "-n", min=1, help="How many layers to insert.")],
    output: NewFolder,
) -> None:
    """The new layers lie at even distances and hand on what they are given. Train them alone with
    `tuning=freeze freeze.trainable_layers=N freeze.spread=true`.
    """
    from lowrank.models.config import named_model

    layers = expand_model(named_model(model), num_new, output)
    typer.echo(f"{layers} layers, {num_new} of them new, in {output}")
    typer.echo(f"train them with model={output} tuning=freeze freeze.trainable_layers={num_new} freeze.spread=true")


def expand_model(config: ModelConfig, num_new: int, folder: Path) -> int:
    """Write the expanded model to `folder`, whole or not at all, in the dtype it was stored in; its layers.

    Raises ModelError, OutputError.
    """
    from transformers import AutoConfig

    from lowrank.checkpoints.full_model import save_full
    from lowrank.errors import ModelError, OutputError
    from lowrank.models.block_expansion import expand as insert
    from lowrank.models.loading.model_class import model_class
    from lowrank.models.loading.pretrained import FILE_FAULTS, cannot_load, load_tokenizer, locate
    from lowrank.models.loading.quiet import quiet_transformers

    if folder.exists():
        raise OutputError(f"{folder} exists already: name another folder with -o, or remove it")
    tokenizer = load_tokenizer(config)
    with quiet_transformers():
        try:
            options = {"revision": config.revision, "trust_remote_code": config.runs_own_code}
            shape = AutoConfig.from_pretrained(locate(config.path), **options)
            model = model_class(shape).from_pretrained(
                locate(config.path), dtype="auto", use_safetensors=True, **options
            )
        except FILE_FAULTS as error:
            raise ModelError(cannot_load("the model", config, error)) from error
    insert(model, num_new)
    save_full(folder, model, tokenizer.save_pretrained)
    return model.config.get_text_config().num_hidden_layers

"""`lowrank vocab`: a copy of a model with more tokens in its vocabulary."""

from __future__ import annotations

from typing import Annotated

import typer

from lowrank.cli.shared_options import NewFolder


def vocab(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a checkpoint, or a hub name.")],
    output: NewFolder,
    tokens: Annotated[str, typer.Option("--tokens", "-t", help="New tokens, with commas between them.")] = "",
    special_tokens: Annotated[
        str, typer.Option("--special-tokens", "-s", help="New tokens that are left out of decoded text.")
    ] = "",
) -> None:
    """The copy is an ordinary model: it is trained, served, merged and converted like any other. Weight files that do
    not change are linked, not copied, where the disk allows it. An adapter learns the new tokens with
    `adapter.trainable_token_indices`.
    """
    from lowrank.export.merge.resize_vocabulary import add_tokens
    from lowrank.models.config import named_model
    from lowrank.models.layer_wrappers import saved_wrapper
    from lowrank.models.loading.pretrained import check_model
    from lowrank.pipelines.adapter_on_base import on_disk
    from lowrank.planning.simulation import read_config
    from lowrank.third_party import code_is_allowed

    check_model(named_model(model))
    given = [[token for token in text.split(",") if token] for text in (tokens, special_tokens)]
    grown = add_tokens(on_disk(named_model(model)), output, *given, trust_remote_code=code_is_allowed())
    rows = f"{grown.new_rows} rows more" if grown.new_rows else "rows to spare were taken"
    numbers = ", ".join(map(str, grown.token_ids))
    typer.echo(f"{len(grown.token_ids)} new tokens ({rows}), numbers {numbers}, in {output}")
    names = ", ".join(f'"{token}"' for own in given for token in own)
    adapted = f"'adapter.trainable_token_indices=[{names}]'"
    wrapped = saved_wrapper(read_config(named_model(str(output))))
    if wrapped is not None:
        adapted = f"tuning=full, since no adapters are trained on {wrapped.title.partition(':')[0]}"
    typer.echo(f"train them with model={output} {adapted}")

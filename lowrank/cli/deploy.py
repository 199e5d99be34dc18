"""`lowrank deploy`: an export, made a model of a server that runs."""

from __future__ import annotations

import json as json_format
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lowrank.cli.shared_options import JsonResult


class Where(str, Enum):
    """Servers that can be deployed to."""

    ollama = "ollama"


def deploy(
    where: Annotated[Where, typer.Argument(metavar="ollama", help="The kind of server.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the model will be called there.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `lowrank export --to ollama` wrote.")],
    host: Annotated[
        str | None, typer.Option(help="Its address, as 192.168.1.5:11434. [OLLAMA_HOST, else this machine]")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Let the server quantize a 16-bit file: q8_0, q4_K_M, q4_K_S.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="One question to see that it answers; empty: none.")] = "Hello",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, send nothing.")] = False,
    json: JsonResult = False,
) -> None:
    """Uploads the files that the server lacks, creates the model as the Modelfile says, and asks it one question."""
    from lowrank.export.publish.ollama_server import deploy as deploy_to
    from lowrank.export.publish.ollama_server import plan, server_url

    assert where is Where.ollama
    url, wanted = server_url(host), plan(name, folder, quantize=quantize)
    if dry_run:
        result = {
            "server": url,
            "blobs": [{"file": str(each.path), "digest": each.digest, "bytes": each.size} for each in wanted.blobs],
            "create": wanted.request(),
            "prompt": prompt,
            "dry_run": True,
        }
        if json:
            print(json_format.dumps(result, ensure_ascii=False))
            return
        for blob in wanted.blobs:
            typer.echo(
                f"would upload {blob.path} ({blob.size / 1e6:,.1f} MB, {blob.digest}) to {url}, unless it is there"
            )
        typer.echo(f"would create {name}: {json_format.dumps(wanted.request(), ensure_ascii=False)}")
        if prompt:
            typer.echo(f"would ask it: {prompt}")
        return
    result = deploy_to(wanted, url, prompt, notify=lambda text: None if json else typer.echo(text))
    if json:
        print(json_format.dumps(result, ensure_ascii=False))
        return
    if prompt:
        typer.echo(f"> {prompt}\n{result['answer']}")
    typer.echo(f"talk to it: ollama run {name}")

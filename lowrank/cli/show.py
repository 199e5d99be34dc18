"""`lowrank show`: the configuration with everything filled in, in its native form."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank.cli.warn import warn

if TYPE_CHECKING:
    from lowrank.config import RunConfig


def show(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML or JSON file, native or LLaMA-Factory's; or settings alone, as model=... data.train=...",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As optimizer.learning_rate=1e-4.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a configuration.")] = False,
) -> None:
    """A LLaMA-Factory file is printed in its native form. The output is a configuration file itself."""
    import yaml

    from lowrank.compat import load_any
    from lowrank.config import RunConfig

    if schema:
        print(json_format.dumps(RunConfig.model_json_schema(), indent=2, ensure_ascii=False))
        return
    if config is None:
        raise typer.BadParameter("give a configuration file, or --schema", param_hint="CONFIG")
    settings, warnings = load_any(config, overrides or [])
    warn(warnings)
    content = resolved(settings)
    if json:
        print(json_format.dumps(content, indent=2, ensure_ascii=False))
    else:
        print(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120), end="")


def resolved(config: RunConfig) -> dict[str, Any]:
    """The native form, complete and without repetition: a job lists only the groups in which it differs from the top.

    Reading it again gives an equal configuration.
    """
    from lowrank.config.schema import DEFAULT_JOB

    first = ("model", "output_dir", "data", "adapter", "objective", "optimizer", "schedule")
    content = config.model_dump(mode="json")
    jobs = [{"name": job.pop("name"), **{k: v for k, v in job.items() if v != content[k]}} for job in content["jobs"]]
    rest = [key for key in content if key not in (*first, "jobs")]
    ordered = {key: content[key] for key in (*first, *rest)}
    return ordered if jobs == [{"name": DEFAULT_JOB}] else {**ordered, "jobs": jobs}

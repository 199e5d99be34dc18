"""What adapters, objectives and optimizers of one's own lack of what training calls: found with the settings.

What comes with the package is not looked at here: its tests are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lowrank.adapters.bottleneck import BottleneckSettings
from lowrank.adapters.prompts import PromptSettings
from lowrank.adapters.variants.base import Variant
from lowrank.objectives.protocol_problems import protocol_problems
from lowrank.third_party import names_code
from lowrank.train.optimizers import OptimizerSettings

if TYPE_CHECKING:
    from lowrank.config.schema import JobConfig

PAGES = {
    "adapter": "docs/add-a-variant.md",
    "objective": "docs/add-an-objective.md",
    "optimizer": "docs/add-an-optimizer.md",
}
"""How one's own are written, by the group of settings that takes them."""


def objective_problems(job: JobConfig) -> list[str]:
    """Why the job's objective cannot be trained with, a line each; nothing for those that come with the package."""
    if not names_code(job.objective.type):
        return []
    return [f"objective: {problem}: {PAGES['objective']}" for problem in _of_objective(job.objective)]


def _of_objective(settings: Any) -> Iterator[str]:
    objective, problem = _built(settings, "objective")
    yield from [problem] if problem else protocol_problems(objective)


def _built(settings: Any, kind: str) -> tuple[Any, str | None]:
    """What a third party's settings build, which is a `kind` in messages; or None and why they do not."""
    if not callable(getattr(settings, "build", None)):
        return None, f"{type(settings).__qualname__} has no method `build()`, which returns the {kind}"
    try:
        return settings.build(), None
    except Exception as error:  # a third party's
        return None, f"{settings.type} cannot be built: {type(error).__name__}: {error}"


def adapter_problems(job: JobConfig) -> list[str]:
    """The same of the job's adapter."""
    settings = job.adapter
    if not names_code(settings.type):
        return []
    return [f"adapter: {problem}: {PAGES['adapter']}" for problem in _of_adapter(settings)]


def _of_adapter(settings: Any) -> Iterator[str]:
    name = type(settings).__qualname__
    if isinstance(settings, PromptSettings):
        if type(settings).encoder is PromptSettings.encoder:
            yield f"{name} has no method `encoder(site, generator)`, which gives the table of virtual tokens"
        return
    if isinstance(settings, BottleneckSettings):
        return
    variant, problem = _built(settings, "variant")
    if problem:
        yield problem
        return
    if not isinstance(variant, Variant):
        yield f"{name}.build gives {variant!r}; expected an object of a subclass of {Variant.__module__}.Variant"
        return
    own = {each for each in ("init", "as_low_rank", "apply", "merge") if _defines(variant, each)}
    kind = type(variant).__name__
    if "init" not in own:
        yield f"{kind} has no method `init(base, rank, scale, generator)`, which returns fresh tensors"
    if "as_low_rank" not in own and not own >= {"apply", "merge"}:
        yield f"{kind} has neither `as_low_rank(tensors)` nor both of `apply` and `merge`, so nothing says what it does"


def _defines(variant: Variant, method: str) -> bool:
    return getattr(type(variant), method) is not getattr(Variant, method)


def optimizer_problems(job: JobConfig) -> list[str]:
    """The same of the job's optimizer."""
    settings = job.optimizer
    if not names_code(settings.type) or type(settings).make is not OptimizerSettings.make:
        return []
    name = type(settings).__qualname__
    return [f"optimizer: {name} has no method `make(groups)`, which returns the optimizer: {PAGES['optimizer']}"]

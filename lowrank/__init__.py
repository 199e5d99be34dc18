"""lowrank: one frozen base, any number of LoRA adapters, from a JSON file to a running model.

    import lowrank

    run = lowrank.train(model="lowrank/tiny", data=rows, output_dir="runs/first")
    run.metrics()                                   # a DataFrame
    model = lowrank.load("runs/first")              # or a checkpoint, an adapter, a merged model, a .gguf file
    model.generate("Who are you?")
    lowrank.export("runs/first", to="merged", output="merged")

docs/api.md has all of it. What is offered here is imported when it is first asked for: `import lowrank` alone takes
neither torch nor transformers along.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank.adapters.variants.base import Variant as Variant
    from lowrank.api.evaluation import evaluate as evaluate
    from lowrank.api.exporting import export as export
    from lowrank.api.inference import Model as Model
    from lowrank.api.inference import generate as generate
    from lowrank.api.inference import load as load
    from lowrank.api.live import LiveRun as LiveRun
    from lowrank.api.serving import RunningServer as RunningServer
    from lowrank.api.serving import serve as serve
    from lowrank.api.settings import rows as rows
    from lowrank.api.training import TrainedRun as TrainedRun
    from lowrank.api.training import train as train
    from lowrank.batches import Batch as Batch
    from lowrank.batches import Scores as Scores
    from lowrank.config import JobConfig as JobConfig
    from lowrank.config import RunConfig as RunConfig
    from lowrank.errors import ConfigError as ConfigError
    from lowrank.errors import DataError as DataError
    from lowrank.errors import LowrankError as LowrankError
    from lowrank.errors import ModelError as ModelError
    from lowrank.errors import NotTheSameError as NotTheSameError
    from lowrank.errors import OutputError as OutputError
    from lowrank.export import ExportTarget as ExportTarget
    from lowrank.generate.request import GenerationConfig as GenerationConfig
    from lowrank.objectives import Objective as Objective
    from lowrank.records import Conversation as Conversation
    from lowrank.records import Message as Message
    from lowrank.records import Preference as Preference
    from lowrank.records import Prompted as Prompted
    from lowrank.records import Rated as Rated
    from lowrank.records import Text as Text
    from lowrank.report.events import CheckpointSaved as CheckpointSaved
    from lowrank.report.events import EvalDone as EvalDone
    from lowrank.report.events import Event as Event
    from lowrank.report.events import JobFinished as JobFinished
    from lowrank.report.events import JobMoved as JobMoved
    from lowrank.report.events import JobStarted as JobStarted
    from lowrank.report.events import Notice as Notice
    from lowrank.report.events import Preparing as Preparing
    from lowrank.report.events import Reporter as Reporter
    from lowrank.report.events import RunFinished as RunFinished
    from lowrank.report.events import RunStarted as RunStarted
    from lowrank.report.events import Stage as Stage
    from lowrank.report.events import StepDone as StepDone
    from lowrank.serve.engine import ServeEngine as ServeEngine
    from lowrank.settings import Settings as Settings
    from lowrank.third_party import code_allowed as code_allowed

__version__ = "0.1.0"

_VERBS = {
    "train": "lowrank.api.training",
    "evaluate": "lowrank.api.evaluation",
    "generate": "lowrank.api.inference",
    "export": "lowrank.api.exporting",
    "serve": "lowrank.api.serving",
}
"""Functions that are called like one of our packages, and where they are."""

_NAMES = {
    "load": "lowrank.api.inference",
    "rows": "lowrank.api.settings",
    "Model": "lowrank.api.inference",
    "TrainedRun": "lowrank.api.training",
    "LiveRun": "lowrank.api.live",
    "RunningServer": "lowrank.api.serving",
    "RunConfig": "lowrank.config",
    "JobConfig": "lowrank.config",
    "GenerationConfig": "lowrank.generate.request",
    "Settings": "lowrank.settings",
    "Objective": "lowrank.objectives",
    "Conversation": "lowrank.records",
    "Message": "lowrank.records",
    "Text": "lowrank.records",
    "Preference": "lowrank.records",
    "Rated": "lowrank.records",
    "Prompted": "lowrank.records",
    "Batch": "lowrank.batches",
    "Scores": "lowrank.batches",
    "Variant": "lowrank.adapters.variants.base",
    "ExportTarget": "lowrank.export",
    "Reporter": "lowrank.report.events",
    "Event": "lowrank.report.events",
    "RunStarted": "lowrank.report.events",
    "JobStarted": "lowrank.report.events",
    "Preparing": "lowrank.report.events",
    "Stage": "lowrank.report.events",
    "Notice": "lowrank.report.events",
    "CheckpointSaved": "lowrank.report.events",
    "JobMoved": "lowrank.report.events",
    "JobFinished": "lowrank.report.events",
    "StepDone": "lowrank.report.events",
    "EvalDone": "lowrank.report.events",
    "RunFinished": "lowrank.report.events",
    "ServeEngine": "lowrank.serve.engine",
    "code_allowed": "lowrank.third_party",
    "LowrankError": "lowrank.errors",
    "ConfigError": "lowrank.errors",
    "DataError": "lowrank.errors",
    "ModelError": "lowrank.errors",
    "OutputError": "lowrank.errors",
    "NotTheSameError": "lowrank.errors",
}
"""Everything else that is offered, and where it is."""
OFFERED = {**_VERBS, **_NAMES}

__all__ = [
    "Batch",
    "CheckpointSaved",
    "ConfigError",
    "Conversation",
    "DataError",
    "EvalDone",
    "Event",
    "ExportTarget",
    "GenerationConfig",
    "JobConfig",
    "JobFinished",
    "JobMoved",
    "JobStarted",
    "LiveRun",
    "LowrankError",
    "Message",
    "Model",
    "ModelError",
    "NotTheSameError",
    "Notice",
    "Objective",
    "OutputError",
    "Preference",
    "Preparing",
    "Prompted",
    "Rated",
    "Reporter",
    "RunConfig",
    "RunFinished",
    "RunStarted",
    "RunningServer",
    "Scores",
    "ServeEngine",
    "Settings",
    "Stage",
    "StepDone",
    "Text",
    "TrainedRun",
    "Variant",
    "__version__",
    "code_allowed",
    "evaluate",
    "export",
    "generate",
    "load",
    "rows",
    "serve",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return importlib.import_module(f"lowrank.{name}")  # which is callable: see _Package
    if name not in _NAMES:
        raise AttributeError(f"module 'lowrank' has no attribute {name!r}")
    found = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)


class _CallablePackage(ModuleType):
    """`lowrank.train` is the package with the training loop in it, and, called, the function that trains.

    The import system binds a package as an attribute of its parent, so a function of that name would be gone with the
    first `import lowrank.train.engine`.
    """

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return _verb(self.__name__)(*arguments, **settings)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_verb(self.__name__))


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and type(value) is ModuleType:
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


def _verb(package: str) -> Any:
    name = package.rpartition(".")[2]
    return getattr(importlib.import_module(_VERBS[name]), name)


sys.modules[__name__].__class__ = _Package

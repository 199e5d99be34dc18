"""Train an adapter, export it as a merged model, in 4 bits and for llama.cpp, and see that it is the same model.

python examples/10_export.py [steps]
"""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from lowrank.config import load
from lowrank.export.targets.awq import AWQExportConfig
from lowrank.export.targets.gguf import GGUFExportConfig
from lowrank.export.targets.merged import MergedExportConfig
from lowrank.export.targets.peft import PeftExportConfig
from lowrank.pipelines.export import export_requests, export_targets
from lowrank.pipelines.export_source import open_source
from lowrank.pipelines.train import train

with tempfile.TemporaryDirectory() as folder:
    here = Path(__file__).parent
    train(load(here / "01_sft.yaml", [f"output_dir={folder}/run", f"max_steps={(sys.argv[1:] or ['30'])[0]}"]))

    found = open_source(f"{folder}/run")
    targets = [PeftExportConfig(), MergedExportConfig(dtype="float16"), AWQExportConfig()]
    if find_spec("xllamacpp"):  # pip install 'lowrank-llm[gguf]'
        targets.append(GGUFExportConfig(types=("q8_0",)))
    result = export_targets(found, export_requests(targets, Path(folder) / "home"))
    for name, target in result["targets"].items():
        (compared,) = target["comparisons"]
        kl, rows = compared["mean_kl"], target["compared_on"]
        print(f"{name}: mean KL {kl:.1e} on {rows}, held out, passed: {target['passed']}")

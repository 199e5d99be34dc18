"""Train an adapter, take it home as a merged model, in 4 bits and for llama.cpp, and see that it is the same model.

python examples/10_export.py [steps]
"""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from lowrank.config import load
from lowrank.export.targets.awq import Config as Awq
from lowrank.export.targets.gguf import Config as Gguf
from lowrank.export.targets.merged import Config as Merged
from lowrank.export.targets.peft import Config as Peft
from lowrank.run import train
from lowrank.take_home import order, take_home
from lowrank.to_take_home import open_source

with tempfile.TemporaryDirectory() as folder:
    here = Path(__file__).parent
    train(load(here / "01_sft.yaml", [f"output_dir={folder}/run", f"max_steps={(sys.argv[1:] or ['30'])[0]}"]))

    found = open_source(f"{folder}/run")
    targets = [Peft(), Merged(dtype="float16"), Awq()]
    if find_spec("xllamacpp"):  # pip install 'lowrank[gguf]'
        targets.append(Gguf(types=("q8_0",)))
    result = take_home(found, order(targets, Path(folder) / "home"))
    for name, told in result["targets"].items():
        (compared,) = told["comparisons"]
        print(f"{name}: mean KL {compared['mean_kl']:.1e} on {told['compared_on']}, held out, passed: {told['passed']}")

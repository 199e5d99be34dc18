"""Train an adapter, export it as a merged model, in 4 bits and for llama.cpp, and see that it is the same model.

python examples/10_export.py [steps]
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import lowrank

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 30

with TemporaryDirectory() as folder:
    run = lowrank.train(Path(__file__).with_name("01_sft.yaml"), output_dir=f"{folder}/run", max_steps=STEPS)

    gguf = [{"type": "gguf", "types": ["q8_0"]}] if find_spec("xllamacpp") else []  # pip install 'lowrank-llm[gguf]'
    result = run.export(["peft", {"type": "merged", "dtype": "float16"}, "awq", *gguf], f"{folder}/home")
    for name, target in result["targets"].items():
        (compared,) = target["comparisons"]
        kl, rows = compared["mean_kl"], target["compared_on"]
        print(f"{name}: mean KL {kl:.1e} on {rows}, held out, passed: {target['passed']}")

"""GGUF files of the Qwen2.5-0.5B shape: lowrank against llama.cpp's own converter and quantizer, in turns.

python -m benchmarks.gguf_speed --converter LLAMA_CPP_SOURCE --quantizer PYTHON [--rounds 3] [--layers 24]

LLAMA_CPP_SOURCE: a folder with convert_hf_to_gguf.py (lowrank's cache has one after the first export of a family that
it does not know itself). PYTHON: one that has llama-cpp-python, whose `llama_model_quantize` is the quantizer;
xllamacpp has none. Every contender is a process of its own, measured from its start to its end, and ends with its file
on the disk (fsync). The weights are random, in bf16, under the names of a Llama, because llama.cpp's converter refuses
tokenizers that it does not know for all others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf

from benchmarks.machine import describe, load, median_of
from benchmarks.merge_speed import make
from tests.data.made_tokenizers import tokenizer_of

_OURS = """
import sys
from pathlib import Path
from lowrank.export.gguf.convert import convert
convert(Path(sys.argv[1]), Path(sys.argv[2]), "f16")
"""
_OUR_QUANTIZER = """
import sys
from pathlib import Path
from lowrank.export.gguf.quantize import quantize_file
quantize_file(Path(sys.argv[1]), Path(sys.argv[2]), "q4_k_m", threads=int(sys.argv[3]))
"""
_THEIR_QUANTIZER = """
import sys
import llama_cpp
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype, settings.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), settings))
"""


def measure(arguments: list[str], out: Path) -> dict[str, float]:
    """Wall seconds with the file on the disk, processor seconds and peak resident bytes of the largest process."""
    out.unlink(missing_ok=True)
    code = (
        "import json, os, resource, subprocess, sys;"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True);"
        "usage = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(json.dumps([done.returncode, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, done.stderr[-2000:]]))"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    with out.open("rb+") if out.exists() else tempfile.TemporaryFile() as written:
        os.fsync(written)
    wall = time.perf_counter() - started
    status, cpu, peak, output = json.loads(done.stdout)
    if status:
        raise SystemExit(f"{' '.join(arguments[:4])}:\n{output}")
    return {"wall": wall, "cpu": cpu, "peak_bytes": 1024 * peak}


def same_tensors(one: Path, other: Path) -> str:
    """How many tensors of two files have the same bytes."""
    ours, theirs = ({each.name: each for each in gguf.GGUFReader(path).tensors} for path in (one, other))
    same = sum(
        name in theirs and each.tensor_type == theirs[name].tensor_type and bool((each.data == theirs[name].data).all())
        for name, each in ours.items()
    )
    return f"{same} of {len(ours)}" if len(ours) == len(theirs) else f"{same} of {len(ours)} and {len(theirs)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--converter", type=Path, required=True)
    parser.add_argument("--quantizer", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    threads = str(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make(folder, arguments.layers, "Llama")
        tokenizer_of("mistral", metaspace=True).save_pretrained(folder / "base")
        model, files = (
            str(folder / "base"),
            {key: folder / f"{key}.gguf" for key in ("ours", "theirs", "q ours", "q theirs")},
        )
        script = [str(arguments.converter / "convert_hf_to_gguf.py"), model, "--outtype", "f16", "--outfile"]
        contenders = {
            "f16 lowrank": ([sys.executable, "-c", _OURS, model, str(files["ours"])], files["ours"]),
            "f16 llama.cpp": ([sys.executable, *script, str(files["theirs"])], files["theirs"]),
            "q4_k_m lowrank": (
                [sys.executable, "-c", _OUR_QUANTIZER, str(files["ours"]), str(files["q ours"]), threads],
                files["q ours"],
            ),
            "q4_k_m llama.cpp": (
                [arguments.quantizer, "-c", _THEIR_QUANTIZER, str(files["ours"]), str(files["q theirs"]), threads],
                files["q theirs"],
            ),
        }  # fmt: skip
        found: dict[str, list[dict[str, float]]] = {key: [] for key in contenders}
        loads = []
        for _ in range(arguments.rounds):
            for key, (arguments, out) in contenders.items():
                found[key].append(measure(arguments, out))
                loads.append(load())
        same = {
            "f16": same_tensors(files["ours"], files["theirs"]),
            "q4_k_m": same_tensors(files["q ours"], files["q theirs"]),
        }
    result: dict[str, Any] = {
        "machine": describe("cpu"), "bytes": size, "threads": arguments.threads, "load": loads, "same_tensors": same,
        "rounds": found,
    }  # fmt: skip
    print(f"{size / 1e9:.2f} GB of bf16 weights, {threads} threads, load {min(loads):.1f} to {max(loads):.1f}\n")
    print("| | wall s | of llama.cpp's time | processor s | peak memory | tensors with the same bytes |")
    print("|---|---|---|---|---|---|")
    for key, rounds in found.items():
        wall, cpu, peak = (median_of([each[part] for each in rounds]) for part in ("wall", "cpu", "peak_bytes"))
        kind = key.split()[0]
        theirs = median_of([each["wall"] for each in found[f"{kind} llama.cpp"]])
        print(f"| {key} | {wall:.2f} | {wall / theirs:.2f} | {cpu:.2f} | {peak / 1e6:.0f} MB | {same[kind]} |")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

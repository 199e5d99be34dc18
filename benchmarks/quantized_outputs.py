"""What quantized weights do to a model's answers: KL divergence of its next-token distribution from the 16-bit model's.

    python -m benchmarks.quantized_outputs [--documents 60]

On the base that ships with lowrank and the held-out rows of its demo, every method of `lowrank quantization-report`,
and the same methods' relative error on 512 x 1024 normal weights. Writes a Markdown table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers

import lowrank
from lowrank.contrib.quantization_report.measures import GROUP, Method, methods
from lowrank.quantization.half_quadratic import half_quadratic

PACKAGE = Path(lowrank.__file__).parent


def main() -> None:
    """Print a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=60)
    documents = parser.parse_args().documents
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(PACKAGE / "models/tiny", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(PACKAGE / "models/tiny")
    lines = (PACKAGE / "data/demo/heldout.jsonl").read_text(encoding="utf-8").splitlines()[:documents]
    texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in lines]
    tokens = [torch.tensor([tokenizer.encode(text)]) for text in texts]
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    originals = [linear.weight.data.clone() for linear in linears]

    @torch.no_grad()
    def answers() -> list[torch.Tensor]:
        return [model(row).logits[0].log_softmax(-1) for row in tokens]

    reference = answers()
    normal = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    print("| method | bits/param | error, normal | error, lowrank/tiny | KL, lowrank/tiny |\n|---|---|---|---|---|")
    published = [
        Method(
            f"hqq{b} as published", "even", "asymmetric", b, 32 / GROUP,
            lambda w, b=b: half_quadratic(w, b, GROUP, fit_scale=False).weight(),
        )
        for b in (2, 3, 4)
    ]  # fmt: skip
    for method in sorted([*methods(), *published], key=lambda each: each.bits + each.overhead):
        error = squared = 0.0
        for linear, original in zip(linears, originals):
            linear.weight.data = method.quantize(original)
            error += float((linear.weight.data - original).square().sum())
            squared += float(original.square().sum())
        divergence = [float((was.exp() * (was - now)).sum(-1).mean()) for was, now in zip(reference, answers())]
        on_normal = float((method.quantize(normal) - normal).norm() / normal.norm())
        print(
            f"| {method.name} | {method.bits + method.overhead:.3f} | {on_normal:.4f} | {(error / squared) ** 0.5:.4f} "
            f"| {sum(divergence) / len(divergence):.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

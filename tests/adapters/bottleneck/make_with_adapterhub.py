"""What AdapterHub's library `adapters` computes: run by its own Python, which has a transformers of its own.

    python make_with_adapterhub.py write FOLDER        the fixtures of test_bottleneck.py
    python make_with_adapterhub.py ask BASE ADAPTER OUT    its logits of an adapter that somebody else wrote

Made with adapters 1.3.0, transformers 4.57.6, torch 2.13.0.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false

import dataclasses
import sys
from pathlib import Path

import adapters
import torch
import transformers
from safetensors.torch import save_file

TOKEN = torch.tensor([[5, 9, 11, 3, 8], [7, 7, 4, 20, 30]])
BASES = {
    "llama": transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    ),
    "gpt2": transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32),
}  # fmt: skip
CASES = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4),
    "parallel": adapters.ParBnConfig(reduction_factor=4),
    "scaled_parallel": adapters.ParBnConfig(mh_adapter=True, scaling="learned", non_linearity="gelu"),
    "channel": adapters.SeqBnConfig(scaling="channel", leave_out=[0], reduction_factor={"1": 8, "default": 2}),
    "ln_after": adapters.DoubleSeqBnConfig(ln_after=True, adapter_residual_before_ln=True, non_linearity="leakyrelu"),
    "stream_kept": adapters.SeqBnConfig(
        original_ln_after=False, residual_before_ln=False, ln_after=True, reduction_factor=4
    ),
    "read_goes_around": adapters.SeqBnConfig(residual_before_ln=False, init_weights="houlsby"),
}


def base_of(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms too
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def add(model, name, config):
    model.add_adapter(name, config=config)
    model.set_active_adapters(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".adapters.{name}." in key:
                parameter += 0.2 * torch.randn_like(parameter)


def wanted_config(model, name):
    """(logits, gradients of the sum of their squares), in float64."""
    model = model.double()
    logits = model(TOKEN).logits
    own = {key: value for key, value in model.named_parameters() if f".adapters.{name}." in key}
    gradients = torch.autograd.grad(logits.pow(2).sum(), list(own.values()))
    return {"logits": logits.detach(), **dict(zip(own, gradients))}


def write(folder):
    for family, config in BASES.items():
        place = Path(folder) / family
        base_of(config).save_pretrained(place / "base")
        for name, adapter in CASES.items():
            model = base_of(config)
            adapters.init(model)
            torch.manual_seed(1)
            add(model, name, dataclasses.replace(adapter))
            model.save_adapter(str(place / name), name, with_head=False, use_safetensors=True)
            save_file(wanted_config(model, name), place / f"{name}.safetensors")


def record(base, adapter, out):
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    adapters.init(model)
    name = model.load_adapter(adapter, with_head=False, use_safetensors=True, set_active=True)
    with torch.no_grad():
        save_file({"logits": model.double()(TOKEN).logits}, out)
    print(name, model.adapters_config.get(name))


if __name__ == "__main__":
    {"write": write, "ask": record}[sys.argv[1]](*sys.argv[2:])

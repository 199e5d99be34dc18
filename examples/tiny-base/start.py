"""The model before training: random weights, and a handful of attention heads that begin as a copying circuit.

A model of this size that starts from noise needs more text than it is given here to find out how to copy: after
1.8 million tokens it could not repeat a single string. The circuit is well known (Olsson et al., In-context Learning
and Induction Heads, 2022; starting attention in the shape it will take: Trockman and Kolter, Mimetic Initialization
of Self-Attention Layers, 2023), so it is where training starts:

    layer 0   heads look one, two, three tokens back, and write down which token stood there
    layer 1+  heads look for places whose noted token is the current one, and say what stands at that place

Nothing is frozen: training keeps, moves or unlearns all of it. Dimensions of the residual stream (D = 256):

    0-191     the token            192-199   the same for every token, so that heads can attend by place alone
    200-231   the token one back   232-255   the token two back, three back (in part)
"""

from __future__ import annotations

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKEN, CONSTANT, ONE_BACK = slice(0, 192), slice(192, 200), slice(200, 232)
FURTHER_BACK = (slice(232, 244), slice(244, 256))
SHARPNESS = 24.0
"""Logit of a head that attends by place, at the place it looks for."""
MATCH = 1.5
"""Scale of query and key of a head that looks for a token."""
COPY = 1.0
"""How strongly such a head says what it found."""
SLOW = 5
"""Rotary frequencies from this one on turn slowly enough to compare tokens a hundred places apart."""


def make_model(vocabulary: int, end: int, padding: int, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 3.0 million parameters; every width is a multiple of 256, as 4-bit formats like it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=padding,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        _embeddings(model)
        for layer in model.model.layers:  # what is still random speaks softly, and does not drown the circuit
            layer.mlp.down_proj.weight *= 0.1
            layer.self_attn.o_proj.weight *= 0.1
        read_RD = _look_back(model)
        for layer in range(1, config.num_hidden_layers):
            _look_for_token(model, layer, read_RD)
    return model


def _embeddings(model: LlamaForCausalLM) -> None:
    weight_VD = model.model.embed_tokens.weight
    weight_VD.normal_(0.0, 1.0 / 16.0)
    weight_VD[:, CONSTANT] = 1.0 / 8.0
    weight_VD[:, 200:] *= 0.1


def _look_back(model: LlamaForCausalLM) -> torch.Tensor:
    """Layer 0, first group of heads: one, two, three and one tokens back. How it reads a token, (R, 192)."""
    attention = model.model.layers[0].self_attn
    width = attention.head_dim
    pairs = width // 2
    frequency = model.model.rotary_emb.inv_freq.double()
    # A head's strength at 1 back over 0 and 2 back comes from the fast frequencies.
    amplitude = torch.zeros(pairs, dtype=torch.float64)
    amplitude[:5] = 1.0
    amplitude *= math.sqrt(SHARPNESS * math.sqrt(width)) / amplitude.norm()
    key = torch.cat([amplitude, torch.zeros(pairs, dtype=torch.float64)])
    _by_place(attention.k_proj.weight[:width], key)
    for head, back in enumerate((1, 2, 3, 1)):
        angle = -back * frequency
        query = torch.cat([amplitude * angle.cos(), amplitude * angle.sin()])
        _by_place(attention.q_proj.weight[head * width : (head + 1) * width], query)
    read_RD = torch.linalg.qr(torch.randn(192, width)).Q.T
    attention.v_proj.weight[:width].zero_()
    attention.v_proj.weight[:width, TOKEN] = read_RD
    attention.o_proj.weight[:, : 4 * width].zero_()
    for head, place in ((0, ONE_BACK), (1, FURTHER_BACK[0]), (2, FURTHER_BACK[1])):
        size = place.stop - place.start
        attention.o_proj.weight[place, head * width : head * width + size] = torch.eye(size) / 4.0
    return read_RD


def _by_place(weight_RD: torch.Tensor, vector_R: torch.Tensor) -> None:
    """Make the projection give `vector_R` for every token; normed, a constant dimension holds about 2."""
    weight_RD.zero_()
    weight_RD[:, CONSTANT] = (vector_R / 16.0).float()[:, None]


def _look_for_token(model: LlamaForCausalLM, layer: int, read_RD: torch.Tensor) -> None:
    """Half the heads of a layer compare the current token with what layer 0 noted, and copy what they find."""
    attention = model.model.layers[layer].self_attn
    width = attention.head_dim
    slow = (torch.arange(width) % (width // 2) >= SLOW).float()[:, None]
    for group in range(2):
        rows = slice(group * width, (group + 1) * width)
        attention.k_proj.weight[rows] *= 0.3
        attention.k_proj.weight[rows, ONE_BACK] += MATCH * 4.0 * slow * torch.eye(width)
        say_RD = torch.linalg.qr(torch.randn(192, width)).Q.T
        attention.v_proj.weight[rows] *= 0.3
        attention.v_proj.weight[rows, TOKEN] += say_RD
        for head in (4 * group, 4 * group + 1):
            columns = slice(head * width, (head + 1) * width)
            attention.q_proj.weight[columns] *= 0.3
            attention.q_proj.weight[columns, TOKEN] += MATCH * slow * read_RD
            attention.o_proj.weight[TOKEN, columns] += COPY / 16.0 * say_RD.T

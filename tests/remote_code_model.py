"""A model of a family that transformers does not know, with its configuration and modelling code in its folder, in the
way of Baichuan: queries, keys and values from one layer, attention of its own, no cache."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load_tokenizer
from lowrank.third_party import code_allowed
from tests.checkpoint_folder import save_checkpoint_folder

_CONFIGURATION = """
from transformers.configuration_utils import PretrainedConfig

class BaiChuanTinyConfig(PretrainedConfig):
    model_type = "baichuan_tiny"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=256, rms_norm_eps=1e-6, use_cache=False, **others):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.max_position_embeddings, self.rms_norm_eps = max_position_embeddings, rms_norm_eps
        self.use_cache = use_cache
        super().__init__(**others)
"""
_SEQUENCE_FIRST = """
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from torch import nn
from .configuration_baichuan_tiny import BaiChuanTinyConfig


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_LBD):
        return hidden_LBD + self.dense(hidden_LBD.cumsum(0))


class ChatGLMModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, past_key_values=None,
                inputs_embeds=None, use_cache=None, **others):
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        x = x.transpose(0, 1)  # (tokens, documents, width)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutputWithPast(last_hidden_state=x)


class BaiChuanTinyForCausalLM(PreTrainedModel):
    config_class = BaiChuanTinyConfig
    base_model_prefix = "transformer"

    def __init__(self, config):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.embedding

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, past_key_values=None,
                inputs_embeds=None, labels=None, use_cache=None, **others):
        hidden = self.transformer(input_ids, inputs_embeds=inputs_embeds).last_hidden_state
        return CausalLMOutputWithPast(logits=self.transformer.output_layer(hidden).transpose(0, 1).contiguous())
"""
"""In the way of ChatGLM's first generations: sequence first, and a head that nothing names."""
NAMED_HEAD = """
    def get_output_embeddings(self):
        return self.transformer.output_layer
"""
_MODELING = """
import math
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from .configuration_baichuan_tiny import BaiChuanTinyConfig


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.epsilon = eps

    def forward(self, hidden_states):
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.epsilon)).to(self.weight.dtype)


def rotate(x, position_ids):
    half = x.shape[-1] // 2
    turn = 1.0 / (10000 ** (torch.arange(half, device=x.device).float() / half))
    angle = position_ids[:, None, :, None].float() * turn
    one, other = x[..., :half], x[..., half:]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, mask, position_ids):
        B, L, D = hidden_states.shape
        q, k, v = (part.view(B, L, self.num_heads, self.head_dim).transpose(1, 2)
                   for part in self.W_pack(hidden_states).chunk(3, -1))
        q, k = rotate(q, position_ids), rotate(k, position_ids)
        weights = (q @ k.transpose(2, 3) / math.sqrt(self.head_dim) + mask).float().softmax(-1).to(q.dtype)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(B, L, D))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act_fn = ACT2FN["silu"]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, mask, position_ids):
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), mask, position_ids)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class BaiChuanTinyPreTrainedModel(PreTrainedModel):
    config_class = BaiChuanTinyConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]


class Model(BaiChuanTinyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, use_cache=None, **others):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, L = x.shape[:2]
        lowest = torch.finfo(x.dtype).min
        mask = torch.full((L, L), lowest, dtype=x.dtype, device=x.device).triu(1)[None, None].expand(B, 1, L, L)
        if attention_mask is not None:
            mask = mask.masked_fill(attention_mask[:, None, None, :] == 0, lowest)
        if position_ids is None:
            position_ids = torch.arange(L, device=x.device)[None].expand(B, L)
        for layer in self.layers:
            x = layer(x, mask, position_ids)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


class BaiChuanTinyForCausalLM(BaiChuanTinyPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, labels=None, use_cache=None, **others):
        hidden = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))
"""


def save_sequence_first_folder(path: Path, *, named_head: bool = False) -> Path:
    """The same of a model in the way of ChatGLM's first generations. `named_head`: its code names it."""
    return save_remote_code_folder(path, _SEQUENCE_FIRST + (NAMED_HEAD if named_head else ""))


def save_remote_code_folder(path: Path, modeling: str = _MODELING) -> Path:
    """Random weights, the code, and a tokenizer. Needs the permission to run it, since it makes the weights."""
    import torch
    import transformers

    save_checkpoint_folder(path)
    (path / "configuration_baichuan_tiny.py").write_text(_CONFIGURATION, encoding="utf-8")
    (path / "modeling_baichuan_tiny.py").write_text(modeling, encoding="utf-8")
    config = {
        "model_type": "baichuan_tiny", "architectures": ["BaiChuanTinyForCausalLM"], "dtype": "float32",
        "auto_map": {
            "AutoConfig": "configuration_baichuan_tiny.BaiChuanTinyConfig",
            "AutoModelForCausalLM": "modeling_baichuan_tiny.BaiChuanTinyForCausalLM",
        },
        "vocab_size": 259, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shape = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(shape, trust_remote_code=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with code_allowed():
        assert load_tokenizer(ModelConfig(path=str(path), trust_remote_code=True)) is not None
    return path

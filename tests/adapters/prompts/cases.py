"""Every kind of virtual tokens with its PEFT peer. A new file with a PromptSettings is here by being there."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch

from lowrank.adapters.prompts import TABLE, PromptSettings
from lowrank.adapters.variants.p_tuning import PromptEncoderConfig
from lowrank.adapters.variants.prefix_tuning import PrefixTuningConfig
from lowrank.settings import configs_in
from tests.tiny_models import make_model

K = 5


PROMPTS: dict[str, Any] = {
    name: config(num_virtual_tokens=K)
    for name, config in configs_in("lowrank.adapters.variants").items()
    if issubclass(config, PromptSettings)
}
CASES: dict[str, Any] = {
    **PROMPTS,
    "p_tuning lstm": PromptEncoderConfig(
        num_virtual_tokens=K, encoder_reparameterization_type="LSTM", encoder_hidden_size=16
    ),
    "prefix_tuning projection": PrefixTuningConfig(
        num_virtual_tokens=K, prefix_projection=True, encoder_hidden_size=12
    ),
}
PEERS: dict[str, Any] = {
    "prompt_tuning": peft.PromptTuningConfig(num_virtual_tokens=K, task_type="CAUSAL_LM"),
    "p_tuning": peft.PromptEncoderConfig(num_virtual_tokens=K, task_type="CAUSAL_LM"),
    "p_tuning lstm": peft.PromptEncoderConfig(
        num_virtual_tokens=K, task_type="CAUSAL_LM", encoder_reparameterization_type="LSTM", encoder_hidden_size=16
    ),
    "prefix_tuning": peft.PrefixTuningConfig(num_virtual_tokens=K, task_type="CAUSAL_LM"),
    "prefix_tuning projection": peft.PrefixTuningConfig(
        num_virtual_tokens=K, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=12
    ),
}
slow = pytest.mark.slow
every_case = pytest.mark.parametrize("case", CASES)
every_prompt = pytest.mark.parametrize("name", PROMPTS)


def families(first: str, *others: str) -> Any:
    """The others are slow only together."""
    return pytest.mark.parametrize("family", [first, *(pytest.param(other, marks=slow) for other in others)])


class Peer:
    """PEFT's model, asked about the words alone."""

    def __init__(self, twin: Any) -> None:
        self.twin = twin

    def __call__(self, input_ids: torch.Tensor) -> Any:
        logits = self.twin(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
        return SimpleNamespace(logits=logits[:, -input_ids.shape[1] :])


def peer_of(case: str, family: str, ours: dict[str, torch.nn.Parameter]) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """PEFT's method on the same model with our values, and its parameters by our names."""
    twin = peft.get_peft_model(make_model(family), copy.deepcopy(PEERS[case])).double().eval()
    own = {
        key.removeprefix("prompt_encoder.default."): value
        for key, value in twin.named_parameters()
        if value.requires_grad
    }
    theirs = {TABLE if TABLE in ours else key: value for key, value in own.items()}
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    with torch.no_grad():
        for key, value in theirs.items():
            value.copy_(ours[key])
    return twin, theirs

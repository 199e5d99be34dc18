"""P-tuning: prompt tuning whose vectors come from a small network while they are trained (arXiv:2103.10385).

Only what the network gives in the end is kept, as PEFT's prompt tuning, which computes the same from it; PEFT's own
P-tuning files hold no more either. A run that is resumed has the network again.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from lowrank.adapters.peft_kind import PeftKind
from lowrank.adapters.prompts import PromptSettings, PromptSite, draw, prompt_kind
from lowrank.adapters.variants.prompt_tuning import PromptTuningConfig
from lowrank.settings import Positive


class PromptEncoderConfig(PromptSettings):
    """Prompt tuning through an encoder, which makes it steadier; saved as prompt tuning."""

    paper: ClassVar[str] = "arXiv:2103.10385"
    when: ClassVar[str] = "where prompt_tuning is unsteady"
    peft: ClassVar[PeftKind] = prompt_kind("P_TUNING")
    type: Literal["p_tuning"] = "p_tuning"
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """What the vectors come from."""
    encoder_hidden_size: Positive | None = None
    """Width of the encoder; left out: the model's."""
    encoder_num_layers: Positive = 2
    """Layers of the LSTM; an MLP has three."""

    def as_saved(self) -> PromptSettings:
        """Prompt tuning."""
        return PromptTuningConfig(num_virtual_tokens=self.num_virtual_tokens)

    def encoder(self, site: PromptSite, generator: torch.Generator) -> nn.Module:
        """PEFT's `PromptEncoder`, by the same names."""
        hidden = self.encoder_hidden_size or site.hidden_size
        layers = self.encoder_num_layers if self.encoder_reparameterization_type == "LSTM" else 0
        return draw(Encoder(self.num_virtual_tokens, site.hidden_size, hidden, layers), generator)


class Encoder(nn.Module):
    """Embeddings of the places (K, D) through an MLP, or a bidirectional LSTM and an MLP: (K, D)."""

    def __init__(self, number: int, width: int, hidden: int, lstm_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(number, width)
        self.lstm_head: nn.LSTM | None = None
        if lstm_layers:
            self.lstm_head = nn.LSTM(width, hidden, lstm_layers, bidirectional=True, batch_first=True)
            ends = [nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width)]
        else:
            ends = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)]
        self.mlp_head = nn.Sequential(*ends)

    def forward(self) -> torch.Tensor:
        """(K, D)."""
        place_KD = self.embedding.weight
        if self.lstm_head is not None:
            place_KD = self.lstm_head(place_KD[None])[0][0]
        return self.mlp_head(place_KD)

"""AWQ on a decoder layer of the merged model: scales chosen, folded, and remembered for what is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lowrank.export.merge.merged import Merged
from lowrank.export.quantize.folding import Fold, Run, find_folds, multiply, same_output
from lowrank.quantization.activation_aware import Rounded, channel_scales


class Scaled:
    """The merged model with scales in it: other weights, the same function.

    columns, rows   by linear: what the columns and the rows of its weight are multiplied with
    changed         by name in the files: norms and biases that what follows is folded into
    """

    def __init__(self, merged: Merged, file_name: Callable[[str], str], rounded: Rounded) -> None:
        self.merged = merged
        self.file_name = file_name
        self.rounded = rounded
        self.columns: dict[str, torch.Tensor] = {}
        self.rows: dict[str, torch.Tensor] = {}
        self.changed: dict[str, torch.Tensor] = {}
        self.folded = self.considered = 0
        """Linears whose inputs have scales, of all."""

    def prepare(
        self,
        parts: Mapping[str, nn.Module],
        linears: Mapping[str, nn.Module],
        moments: dict[str, torch.Tensor],
        run: Run,
    ) -> None:
        """Fold scales into a layer (its `parts`, `linears` among them). `moments` become those of the scaled inputs."""
        self.considered += len(linears)
        for fold in find_folds(parts, linears, run):
            if all(name in moments for name in fold.consumers):
                self._fold(fold, parts, moments, run)

    def weight(self, name: str, weight_OD: torch.Tensor) -> torch.Tensor:
        """A linear's weight as it is to be rounded."""
        if name in self.columns:
            weight_OD = weight_OD * self.columns[name].to(weight_OD.device)
        if name in self.rows:
            weight_OD = weight_OD * self.rows[name].to(weight_OD.device)[:, None]
        return weight_OD

    def _fold(self, fold: Fold, parts: Mapping[str, Any], moments: dict[str, torch.Tensor], run: Run) -> None:
        producer, consumers = parts[fold.producer], [parts[name] for name in fold.consumers]
        moment_DD = moments[fold.consumers[0]]
        weight_OD = torch.cat([self._exact(name, "weight") for name in fold.consumers]).to(moment_DD.device)
        row_D = fold.row_D.to(moment_DD.device)
        wanted_R = channel_scales(weight_OD, moment_DD, row_D, len(producer.weight), self.rounded)
        changed, scale_R = self._divided(fold, producer, wanted_R.cpu())
        scale_D = scale_R[fold.row_D.cpu()].to(moment_DD.device)
        before, kept = run(), [part.weight.detach().clone() for part in (producer, *consumers)]
        bias = producer.bias.detach().clone() if getattr(producer, "bias", None) is not None else None
        with torch.no_grad():
            multiply(producer, fold.offset, 1 / scale_R)
            for consumer in consumers:
                consumer.weight.copy_(consumer.weight.float() * scale_D)
            if not same_output(before, run()):  # somebody else needs what the producer gives
                for part, weight in zip((producer, *consumers), kept):
                    part.weight.copy_(weight)
                if bias is not None:
                    producer.bias.copy_(bias)
                return
        self.changed |= changed
        if producer.weight.ndim > 1:
            self.rows[fold.producer] = 1 / scale_R
        for name in fold.consumers:
            self.columns[name] = scale_D
            moments[name] = moment_DD / (scale_D[:, None] * scale_D[None, :])
        self.folded += len(consumers)

    def _divided(
        self, fold: Fold, producer: Any, scale_R: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The producer's vectors as they will stand in the files, and the scales that these then really hold."""
        changed: dict[str, torch.Tensor] = {}
        if producer.weight.ndim == 1:
            file = self.file_name(f"{fold.producer}.weight")
            whole_R = self._exact(fold.producer, "weight") + fold.offset
            changed[file] = (whole_R / scale_R - fold.offset).to(self.merged[file].dtype)
            left_R = changed[file].float() + fold.offset
            scale_R = torch.where((left_R != 0) & (whole_R != 0), whole_R / left_R, scale_R)
        if getattr(producer, "bias", None) is not None:
            file = self.file_name(f"{fold.producer}.bias")
            changed[file] = (self._exact(fold.producer, "bias") / scale_R).to(self.merged[file].dtype)
        return changed, scale_R

    def _exact(self, name: str, kind: str) -> torch.Tensor:
        """A tensor of the merged model, with what is folded into it so far."""
        file = self.file_name(f"{name}.{kind}")
        if file in self.changed:
            return self.changed[file].float()
        exact = self.merged.tensor(file, torch.float32)
        return self.weight(name, exact) if kind == "weight" else exact

"""Settings of the base model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lowrank.models.storages import StorageConfig
from lowrank.settings import NonNegative, Settings


class Config(Settings):
    """The one frozen base of a run."""

    path: str
    """A folder with a transformers checkpoint, a hub name, or `lowrank/tiny`, the base that ships with lowrank."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    storage: StorageConfig = Field(default_factory=dict)  # type: ignore[assignment]  # validated into a Config
    """How the frozen weights are kept: dense (in the run's dtype), or packed as they load: nf4 (QLoRA), fp4, int8, hqq.
    For a checkpoint that is quantised already, leave it out."""
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    """What the base computes in. auto: bfloat16 where the processor has it in hardware, else float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ... auto: the GPU if there is one."""
    attention: Literal["auto", "packed", "padded"] = "auto"
    """packed: one flat stream of documents. padded: one document per padded row, slower. auto: packed if a test at load
    time finds that no document sees another and nothing else changed, else padded, and it says so."""
    recompute: Literal["none", "full"] | NonNegative = "none"
    """Recompute decoder layers in the backward pass instead of keeping their activations: no layer, every layer, or
    the first n. Saves memory, costs up to half again the time."""
    lean: bool = True
    """Put norms and gated MLPs that keep less for the backward pass (a third less in all) in place of the model's own,
    wherever a test at load time finds that they compute the same bits."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models you have read."""

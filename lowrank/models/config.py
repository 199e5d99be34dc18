"""Settings of the base model."""

from __future__ import annotations

from dataclasses import fields
from typing import Literal

from pydantic import Field

from lowrank.media.limits import (
    MAX_PIXELS,
    MIN_PIXELS,
    VIDEO_FPS,
    VIDEO_MAX_PIXELS,
    VIDEO_MAXLEN,
    VIDEO_MIN_PIXELS,
    MediaLimits,
)
from lowrank.models.layer_wrappers import LayerWrapperChoice
from lowrank.models.rope_scaling import RopeScaling
from lowrank.models.storages import StorageConfig
from lowrank.settings import NonNegative, Positive, Settings
from lowrank.third_party import code_is_allowed


class ModelConfig(Settings):
    """The one frozen base of a run."""

    path: str
    """A folder with a transformers checkpoint, a hub name, or `lowrank/tiny`, the base that ships with lowrank."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    storage: StorageConfig = Field(default_factory=dict)  # type: ignore[assignment]  # validated into a Config
    """How the frozen weights are kept: dense (in the run's dtype), bf16 (under a run in float32, half its memory), or
    packed as they load: nf4 (QLoRA), fp4, int8, eetq, hqq. For a checkpoint that is quantized already, leave it out."""
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    """What the base computes in. auto: bfloat16 where the processor or the GPU has it in hardware, float16 on older
    NVIDIA GPUs (T4, RTX 20; losses are scaled), else float32; on Apple's GPUs (mps) float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1, xpu (Intel), mps (Apple) ... auto: the GPU if there is one, NVIDIA's or AMD's (both `cuda`)
    before Intel's before Apple's."""
    attention: Literal["auto", "packed", "padded"] = "auto"
    """packed: one flat stream of documents. padded: one document per padded row, slower. auto: packed if a test at load
    time finds that no document sees another and nothing else changed, else padded, and it says so."""
    activation_checkpointing: Literal["auto", "none", "selective", "full", "sqrt", "offload"] | NonNegative = "auto"
    """What decoder layers do with their activations until the backward pass. none: keep them. selective: keep the
    attention's result, compute the rest again. full: compute every layer again from its input; a number n: the first n
    layers. sqrt: keep only every sqrt(n)-th input, and compute layers up to twice again. offload: keep them in host
    memory (GPU). auto: the first of none, n, selective, full, sqrt that fits into memory. The results are the same,
    bit by bit."""
    memory_efficient_modules: bool = True
    """Put norms and gated MLPs that keep less for the backward pass (a third less in all) in place of the model's own,
    wherever a test at load time finds that they compute the same bits."""
    rope_scaling: RopeScaling | None = None
    """Stretch the rotary embedding for longer documents than the base was made for: {type: yarn, factor: 4}."""
    shift_attn: int | None = Field(default=None, ge=2, multiple_of=2)
    """LongLoRA's shifted sparse attention (arXiv:2309.12307): in training, half of the heads attend within groups of so
    many tokens of a document, the other half within groups shifted by half of that; a quarter of data.max_length is
    usual. Evaluation and generation attend to everything. Left out: so does training."""
    layer_wrapper: LayerWrapperChoice | None = None
    """Convert the base: a method that puts a forward pass of its own around decoder layers, by its `type`. With tuning:
    full. What comes of it runs in lowrank alone: no export has such layers."""
    router_aux_loss_coef: float | None = Field(default=None, gt=0)
    """Weight of the loss that keeps the experts of a mixture evenly used, transformers' `router_aux_loss_coef`; a mean
    over the forward passes of a step. Left out: that loss plays no part."""
    random_init: NonNegative | None = None
    """Begin with random weights drawn from this seed, in the shape that config.json describes, instead of those of the
    checkpoint, which need not be there. With tuning: full."""
    image_max_pixels: Positive = MAX_PIXELS
    """Pictures of more pixels are made smaller, in their proportions, before the model's own processor sees them:
    768 x 768 as in LLaMA-Factory. What exports and serves the model should do the same."""
    image_min_pixels: Positive = MIN_PIXELS
    """Pictures of fewer pixels are made larger."""
    video_max_pixels: Positive = VIDEO_MAX_PIXELS
    """Frames of videos of more pixels are made smaller: 256 x 256 as in LLaMA-Factory."""
    video_min_pixels: Positive = VIDEO_MIN_PIXELS
    """Frames of videos of fewer pixels are made larger."""
    video_fps: float = Field(default=VIDEO_FPS, gt=0)
    """So many frames of each second of a video are shown, at even distances; of one that rows give as a list of
    pictures all, which are taken to be so many in a second."""
    video_maxlen: Positive = VIDEO_MAXLEN
    """But never more frames of one video than this."""
    cache_vision_features: bool = False
    """Keep on disk, in the cache folder, what the tower makes of pictures and videos, so that it looks at those of a
    document once, over epochs, jobs and runs. Only where nothing of the tower and the projector is trained."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model, where the command says --allow-code too. Only for models you have
    read."""

    @property
    def limits(self) -> MediaLimits:
        """Of pictures and videos."""
        return MediaLimits(**{each.name: getattr(self, each.name) for each in fields(MediaLimits)})

    @property
    def runs_own_code(self) -> bool:
        """Whether Python that comes with the model is run: the settings ask for it, and the person allows it."""
        return self.trust_remote_code and code_is_allowed()


class FreezeConfig(Settings):
    """Which parameters `tuning: freeze` trains."""

    trainable_layers: int = 2
    """The last n decoder layers; below 0: the first n."""
    trainable_modules: tuple[str, ...] = ("all",)
    """Parts of those layers: `all`, or names such as `self_attn`, `mlp`, `input_layernorm`."""
    extra_modules: tuple[str, ...] = ()
    """Parts outside the layers: `embed_tokens`, `norm`, `lm_head`."""
    spread: bool = False
    """Take the n layers at even distances, the last of every n-th part of the model: the blocks that `lowrank expand`
    inserted (LLaMA Pro)."""


def named_model(path: str, revision: str | None = None) -> ModelConfig:
    """A model that a command names, not a file of settings: where that command allows code, the model's own runs."""
    return ModelConfig(path=path, revision=revision, trust_remote_code=code_is_allowed())

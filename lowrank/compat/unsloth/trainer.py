"""Unsloth's own trainer: SFTTrainer with another learning rate for the embedding and the head."""

from __future__ import annotations

from typing import Any

from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]  # past `trl` they are not translated

from lowrank.compat.unsloth.vision_collator import UnslothVisionDataCollator
from lowrank.errors import ConfigError

__all__ = ["UnslothTrainer", "UnslothTrainingArguments", "UnslothVisionDataCollator", "unsloth_train"]


class UnslothTrainingArguments(SFTConfig):
    """SFTConfig and `embedding_learning_rate`: that of whole copies (embed_tokens, lm_head); None is as the others."""

    def __init__(self, embedding_learning_rate: float | None = None, *args: Any, **given: Any) -> None:
        if given.pop("q_galore_config", None) is not None:
            raise ConfigError("q_galore_config: Q-GaLore is not here; `lowrank train` has GaLore (optimizer: galore)")
        super().__init__(*args, **given)
        self.embedding_learning_rate = embedding_learning_rate


class UnslothTrainer(SFTTrainer):
    """SFTTrainer whose optimizer has a group of its own for whole copies, with `embedding_learning_rate`."""

    def create_optimizer(self, *args: Any, **given: Any) -> Any:
        """As in transformers, or the two groups."""
        rate = getattr(self.args, "embedding_learning_rate", None)
        if rate is None or self.optimizer is not None:
            return super().create_optimizer(*args, **given)
        model: Any = self.model
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
        trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        copies = [each for name, each in trained if ".modules_to_save." in name]
        others = [each for name, each in trained if ".modules_to_save." not in name]
        groups = [{"params": others, "lr": self.args.learning_rate}, {"params": copies, "lr": rate}]
        decay = self.args.weight_decay
        self.optimizer = kind([{**group, "weight_decay": decay} for group in groups if group["params"]], **settings)
        return self.optimizer


def unsloth_train(trainer: Any, *args: Any, **given: Any) -> Any:
    """`trainer.train()`: transformers divides by the tokens of all accumulated batches itself by now."""
    return trainer.train(*args, **given)

"""lowrank: one frozen base, any number of LoRA adapters, from a JSON file to a running model."""

__version__ = "0.1.0"

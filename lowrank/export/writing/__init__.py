"""Checkpoint files: safetensors shards, and the files beside the weights."""

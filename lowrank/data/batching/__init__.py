"""Samples as optimizer steps: packing, mixing, the dataloader."""

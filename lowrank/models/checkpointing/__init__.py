"""Activation memory: activation checkpointing, offloading, modules that keep less for backward."""

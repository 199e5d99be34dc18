"""Sweeps: many candidates on one base, most of which are not trained to their end."""

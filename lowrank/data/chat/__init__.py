"""Conversations as tokens: chat template, loss mask, truncation."""

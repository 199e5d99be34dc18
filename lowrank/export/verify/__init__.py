"""Reads an export back and compares it with the model that was trained."""

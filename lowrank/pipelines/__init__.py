"""Whole commands, from settings to results: train, export, answer. The only room that sees `RunConfig`."""

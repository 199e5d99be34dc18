"""What few need and much would have to know of: found by name through the core's seams, and mentioned nowhere in it.

Looser rules than the core's: it may change, or go, without a decision. Import-linter keeps the core from importing it.

    layer_wrappers/    forward passes around decoder layers (models/layer_wrappers.py)
    commands/          commands besides those of cli/main.py
"""

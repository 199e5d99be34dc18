"""Commands besides those of lowrank/cli: one file each with a function of its name, a dash for an underscore."""

COMMANDS = {
    "quantization-report": "Show what each way to quantize would cost a model.",
}
"""Each with its line in `lowrank --help`."""

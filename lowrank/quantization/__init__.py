"""How weights become few bits: the reference quantizers, in plain torch, and what each of them costs a checkpoint.

These are the definitions that storages and their kernels are tested against, and the source of the
numbers in docs/quantization.md.
"""

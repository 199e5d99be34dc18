"""How weights become few bits: the reference quantisers, in plain torch, and what each of them costs a checkpoint.

These are the definitions that storages and their kernels are tested against, and the source of the
numbers in docs/quantisation.md.
"""

"""LLaMA-Factory's files and flags, read as they are.

A file for training becomes a native mapping (`convert`, from `keys`), one for anything else the words of a command
(`commands`, from `use_keys`); one of V1 is brought into V0's keys first (`v1`). `page` writes docs/llamafactory.md.
"""

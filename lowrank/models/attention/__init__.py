"""Attention over packed documents, over a paged KV cache, with shared and with learned prefixes."""

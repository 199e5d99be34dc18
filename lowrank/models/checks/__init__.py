"""What every base must pass when it is loaded: no leak between documents, the same answers with a KV cache."""

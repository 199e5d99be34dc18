"""The packaged base that sees: a LLaVA of 1.1 million parameters; examples/tiny-vision/ is how it was made."""

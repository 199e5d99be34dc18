"""The packaged vision-language base: a LLaVA of 1.1 million parameters; examples/tiny-vision/ is how it was made."""

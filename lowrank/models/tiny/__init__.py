"""The base that ships with lowrank: a Llama of 3 million parameters; examples/tiny-base/ is how it was made."""

"""The base with its adapters merged in, tensor by tensor."""

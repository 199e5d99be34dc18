"""The merged model in few bits: GPTQ, AWQ, compressed-tensors."""

"""The GPU path on a machine without GPU (`make rehearse`): a CUDA build of torch, and tensors that say cuda:0 and have
no memory. Everything runs but the kernels themselves: our code, autograd's engine, what each operator refuses."""

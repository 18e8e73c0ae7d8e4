"""The CUDA kernels of the operator pair: what is launched, and how it is compiled."""

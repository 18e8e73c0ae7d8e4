"""Builds the CUDA kernels for the host with g++, to test them and to count their bytes without a GPU."""

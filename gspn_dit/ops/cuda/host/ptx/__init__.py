"""NVRTC's PTX on a CPU: what a GPU would assemble, parsed, translated to C++ and run on the fibre runtime."""

"""Executes the compiled PTX of Triton kernels on a CPU, with checks that a GPU does not make.

Triton compiles each launch for an NVIDIA GPU; only its driver is replaced (`driver`). The PTX is parsed (`program`),
each instruction becomes a function of numpy arrays (`instructions`), and `machine` runs all threads of several CTAs at
a time. Every access is checked (`memory`, `races`): bounds, alignment, uninitialised reads, races; and every barrier.

Not modelled: ptxas and the machine code, caches and time, the weak order of memory, atomics, asynchronous copies,
clusters, tensor cores, shuffles of part of a warp. An unknown instruction raises `Unsupported`.
"""

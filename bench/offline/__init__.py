"""The GPU kernels without a GPU: compiled for it, disassembled, and their time predicted."""

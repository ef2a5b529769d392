"""Triton kernels of the fused layer, installed as ``egnn_fast.kernels``: one file a kernel."""

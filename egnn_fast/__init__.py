"""E(n)-equivariant graph networks with fused kernels."""

__version__ = "0.1.0"

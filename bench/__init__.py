"""Benchmarks under pytest-benchmark; see README.md."""

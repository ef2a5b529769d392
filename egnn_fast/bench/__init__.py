"""Benchmarks: ``egnn-fast bench`` and the suites in ``bench/`` take cases and peers from here.

:mod:`~egnn_fast.bench.cases` says what is measured, :mod:`~egnn_fast.bench.peers` what it is
compared with, :mod:`~egnn_fast.bench.run` how.
"""

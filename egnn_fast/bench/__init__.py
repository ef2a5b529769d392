"""Benchmarks: the code of ``egnn-fast bench``, and cases and peers for the suites in ``bench/``.

:mod:`~egnn_fast.bench.cases` has what is measured, :mod:`~egnn_fast.bench.peers` what egnn_fast is
compared with, and :mod:`~egnn_fast.bench.run` runs both.
"""

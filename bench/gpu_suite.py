"""Checks and times the Triton kernels on a GPU: ``python bench/gpu_suite.py --out FOLDER``.

It runs from a plain checkout, installed or not, without network; ``bench/README.md`` tells more.
"""

from __future__ import annotations

import sys
from pathlib import Path

# children, which are started by this file too, find the package in the same place
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.gpu.command import main

if __name__ == "__main__":
    sys.exit(main())

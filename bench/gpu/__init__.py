"""What ``bench/gpu_suite.py`` runs.

``command`` reads the options, ``items`` lists all that can be run, ``children`` runs it in
processes of their own, ``checks``, ``system``, ``large``, ``times`` and ``tune`` are what is run,
``results``, ``derive`` and ``plots`` are what is made of it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import egnn_fast

ROOT = Path(__file__).resolve().parent.parent.parent

# in a checkout that is not installed, the package has its kernels from the folder beside it
if find_spec("egnn_fast.kernels") is None:
    egnn_fast.__path__.append(str(ROOT))

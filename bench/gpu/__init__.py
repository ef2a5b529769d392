"""What ``bench/gpu_suite.py`` runs.

``command`` reads the options, ``items`` lists all that can be run, ``plan`` says in which order,
``run`` does it: ``children`` in processes of their own, taken from ``waiting``, with the variant
of the compiler that ``variants`` knows.

What is run: ``smoke``, ``sanitizer``, ``checks``, ``system``, ``large``, ``times``, ``host`` and
``tune``. What is made of it: ``results``, ``triage``, ``derive``, ``report`` and ``plots``.
``plant`` breaks things on purpose.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import egnn_fast

ROOT = Path(__file__).resolve().parent.parent.parent

# in a checkout that is not installed, the package has its kernels from the folder beside it
if find_spec("egnn_fast.kernels") is None:
    egnn_fast.__path__.append(str(ROOT))

"""Peak memory of forward + backward, measured in a fresh process.

``python -m egnn_fast.bench.memory CASE PEER THREADS`` prints the bytes, or null.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

from egnn_fast.bench import measure
from egnn_fast.bench.cases import CASES, EAGER, TRAINING, Case
from egnn_fast.experiments.errors import ExperimentError

_WARM_UP_EDGES = 640
# Numbers that an eager layer needs for each edge, over H: autograd saves 8 H + 9; temporaries make
# it 11 H.
_EAGER_NUMBERS = 11


class Memory(NamedTuple):
    """How far a process's peak memory exceeds its memory before the run.

    Graph, inputs and weights exist before the run. ``peak_bytes`` is None if it was not measured;
    ``skipped`` then says why.
    """

    peak_bytes: int | None
    skipped: str | None = None


def skipped(case: Case, peer: str) -> str | None:
    """Why a peer is not run: it would not fit into memory. None if it is run."""
    if peer not in EAGER:
        return None
    free = measure.available_memory()
    need = case.num_edges * _EAGER_NUMBERS * case.hidden * case.itemsize * case.layers
    if free is None or need <= free:
        return None
    return f"would need about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def peak(case: Case, peer: str, threads: int) -> Memory:
    """Measure a peer in a fresh process, on ``threads`` threads.

    Raises
    ------
    ExperimentError
        The process failed.
    """
    reason = skipped(case, peer)
    if reason is not None:
        return Memory(None, reason)
    command = [sys.executable, "-m", __name__, case.name, peer, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExperimentError(
            f"measuring the memory of {peer} on {case.name} failed "
            f"(exit status {done.returncode}): {last}"
        )
    peak_bytes = json.loads(done.stdout)
    reason = "a process's peak can be read on Linux only" if peak_bytes is None else None
    return Memory(peak_bytes, reason)


def main(name: str, peer: str, threads: str) -> None:
    """Measure in this process, and print."""
    import torch

    from egnn_fast.bench import problems
    from egnn_fast.bench.peers import PEERS

    torch.set_num_threads(int(threads))
    (case,) = (case for case in CASES if case.name == name)
    # Warm up: what is loaded and allocated once (the BLAS, threads, their stacks) must not count.
    PEERS[peer].build(problems.build(case.at_most(_WARM_UP_EDGES))).timed(TRAINING)()
    run = PEERS[peer].build(problems.build(case)).timed(TRAINING)
    print(json.dumps(measure.peak_growth(run)))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Peak memory of forward + backward, in a process that does nothing else.

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
# autograd keeps 8 H + 9 numbers of an edge in an eager layer; with what comes and goes, 11 H
_EAGER_NUMBERS = 11


class Memory(NamedTuple):
    """Growth of a process's peak resident size over that with graph, inputs and weights built.

    ``peak_bytes`` is None where the system does not tell, or where it was not tried; ``skipped``
    says why then.
    """

    peak_bytes: int | None
    skipped: str | None = None


def skipped(case: Case, peer: str) -> str | None:
    """Why a peer is not tried: it would not fit into memory."""
    if peer not in EAGER:
        return None
    free = measure.available_memory()
    need = case.num_edges * _EAGER_NUMBERS * case.hidden * case.itemsize * case.layers
    if free is None or need <= free:
        return None
    return f"would need about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def peak(case: Case, peer: str, threads: int) -> Memory:
    """Measure in a fresh process.

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
    found = json.loads(done.stdout)
    return Memory(found, None if found is not None else "only Linux tells a process's peak")


def main(name: str, peer: str, threads: str) -> None:
    """Measure in this process, and print."""
    import torch

    from egnn_fast.bench import problems
    from egnn_fast.bench.peers import PEERS

    torch.set_num_threads(int(threads))
    (case,) = (case for case in CASES if case.name == name)
    # what is loaded and allocated once, such as the BLAS, its threads and their stacks
    PEERS[peer].build(problems.build(case.at_most(_WARM_UP_EDGES))).timed(TRAINING)()
    run = PEERS[peer].build(problems.build(case)).timed(TRAINING)
    print(json.dumps(measure.peak_growth(run)))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The list of all that can be run."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from bench.gpu.setting import SKIP, Item, Outcome, Setting

# what the models that are timed need beyond PyTorch
NEEDED = ("lightning_fabric",)


def all_items(setting: Setting) -> dict[str, Item]:
    """By name, in the order in which they run where there is time for all."""
    from bench.gpu import checks, large, system, tune

    # first what times rest on, which compiles what is timed
    found = [*large.timed_items(setting), *checks.items(setting)]
    found += [*large.items(setting), *system.items(setting)]
    found += [*_times(setting), *tune.candidate_items(setting), *tune.timing_items(setting)]
    by_name = {item.name: item for item in found}
    if len(by_name) != len(found):
        raise ValueError("two items have one name")
    return by_name


def _times(setting: Setting) -> Iterator[Item]:
    from bench.gpu import times

    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        reason = f"not installed: {', '.join(missing)}"
        yield Item("times", "times", lambda setting: Outcome(SKIP, reason), 0)
        return
    yield from times.items(setting)

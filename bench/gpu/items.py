"""The list of all that can be run."""

from __future__ import annotations

from bench.gpu.setting import Item, Setting


def all_items(setting: Setting) -> dict[str, Item]:
    """By name; :mod:`bench.gpu.plan` says in which order they run."""
    from bench.gpu import checks, host, large, sanitizer, smoke, system, times, tune

    found = [*smoke.items(setting), *sanitizer.items(setting)]
    found += [*large.timed_items(setting), *checks.items(setting)]
    found += [*large.items(setting), *system.items(setting)]
    found += [*times.items(setting), *host.items(setting)]
    found += [*tune.candidate_items(setting), *tune.timing_items(setting)]
    by_name = {item.name: item for item in found}
    if len(by_name) != len(found):
        raise ValueError("two items have one name")
    return by_name

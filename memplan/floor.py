"""Seconds that no candidate of a family can go below where its bytes must go somewhere: what cuts a search short."""

import numpy as np

from memplan.bounds import cpu_step_seconds, least_seconds
from memplan.candidates import FamilySearch
from memplan.memory import Counts


def floor_seconds(search: FamilySearch) -> float:
    """A lower bound of the seconds of every candidate that fits; infinite where none can.

    The fewest units of each kind that must leave the GPU whatever the others do, the least of them on NVMe for which
    the host has no room, and the bound of that. Bytes and seconds only grow, or fall, with each of the counts.
    """
    t, n = search.tables, search.tables.units
    some = np.arange(n + 1)
    parameters = _fewest(search, Counts(n, n, some))
    gradients = _fewest(search, Counts(n, some, n))
    state = _fewest(search, Counts(some, some, some))
    if parameters is None or gradients is None or state is None:
        return float("inf")
    state = max(state, gradients, parameters)
    held = t.host_state[state] + t.host_mirrors[state] - t.host_mirrors[parameters]
    over = held + t.host_parameters[parameters] + t.host_gradients[gradients] - search.host_budget
    on_disk = min(int(np.searchsorted(t.host_state, over)), state)
    weights = 0
    if on_disk == state:
        weights = min(int(np.searchsorted(t.host_parameters, over - t.host_state[state])), parameters)
    least = Counts(*(np.array([count]) for count in (state, gradients, parameters, on_disk, weights)))
    bound = cpu_step_seconds if search.problem.device == "cpu" else least_seconds
    return float(bound(search.work, least)[0])


def _fewest(search: FamilySearch, counts: Counts) -> int | None:
    """Position of the first of these candidates that fits the GPU."""
    fits = search.tables.gpu_bytes(counts) + search.upper_bytes <= search.problem.budget.gpu_bytes
    return int(np.argmax(fits)) if fits.any() else None

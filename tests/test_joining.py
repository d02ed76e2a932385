"""How ranks come together: who is late is waited for as at a start, and named."""

import time
from pathlib import Path

import pytest

from memplan import launch
from offload import watchdog
from offload.engine import Engine
from tests.models import GPT
from tests.plans import G, plan_for
from tests.ranks import on_ranks


def build_late(rank: int, world: int, seconds: float) -> float:
    """For how long the engine's making waits, in a training whose collectives wait for less."""
    watchdog.SILENT_SECONDS = 3.0  # this process ends after it
    watchdog.begin(timeout_seconds=0.5)
    assert watchdog.current().backstop("gather").total_seconds() < seconds
    if rank == 1:
        time.sleep(seconds)
    began = time.monotonic()
    model = GPT(layers=1)
    with Engine(model, plan_for(model, ((G, G, G),), gpus=world, zero_stage=3)):
        waited = time.monotonic() - began
    watchdog.end()
    return waited


def test_a_rank_that_builds_its_model_for_longer_than_collectives_wait_is_waited_for() -> None:
    assert on_ranks(2, build_late, 7.0)[0] > 4

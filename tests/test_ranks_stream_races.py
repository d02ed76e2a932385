"""Over two ranks, too, nothing races, and no wait is there for nothing: collectives have streams of their own."""

from pathlib import Path
from typing import Any

import pytest

from offload.plan import Buckets
from tests.plans import EVERY_TIER, G, H
from tests.ranks import on_ranks
from tests.test_engine_stream_races import ON_HOST, Case, check, evaluate, save, simulated

WORLD = 2
SLOTS = Buckets(prefetch_units=1, update_elements=1000, io_bytes=16384, update_slots=9)


def case_of(stage: int, placements: tuple, accumulation: int = 1, share: float = 0.0, **how: object) -> Case:
    changes = {"gpus": WORLD, "zero_stage": stage, "buckets": SLOTS, "gpu_update_share": share}
    return Case(placements, changes={**changes, "gradient_accumulation_steps": accumulation}, **how)


CASES = {
    "stage 0": case_of(0, ((G, G, G), (H, H, H), (G, G, H)), accumulation=2),
    "stage 1": case_of(1, ON_HOST, share=0.5),
    "stage 2": case_of(2, EVERY_TIER, accumulation=2),
    "stage 3": case_of(3, EVERY_TIER, between=evaluate),
    "stage 3, saving": case_of(3, EVERY_TIER, share=0.5, between=save),
}
NEEDED_BY_RANKS = {
    "DividedGradients._reduce: after[0]": "stage 1",
    "DividedGradients._target: idle.wait()": "stage 2",
    "DividedGradients.norm: self._reduces.submit(total).wait()": "stage 1",
    "WeightMover._gather: after[0]": "stage 1",
}


def on_rank(_: int, __: int, jobs: list[tuple[str, str | None]], directory: str) -> list[tuple[list[str], set[str]]]:
    """The races and the waits of these cases, each with a wait left out."""
    found = []
    for number, (name, left_out) in enumerate(jobs):
        path = Path(directory, str(number))
        path.mkdir(exist_ok=True)  # by both
        found.append(simulated(CASES[name], path, left_out))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[list[str], set[str]]]]:
    """What both ranks found: in every case, then without each of the waits."""
    jobs = [*((name, None) for name in CASES), *((name, wait) for wait, name in NEEDED_BY_RANKS.items())]
    return on_ranks(WORLD, on_rank, jobs, str(tmp_path_factory.mktemp("ranks")))


def test_nothing_races(trained: Any) -> None:
    for rank in trained:
        for found, waits in rank[: len(CASES)]:
            check(found, waits - NEEDED_BY_RANKS.keys())


def test_without_any_one_of_the_waits_something_races(trained: Any) -> None:
    for wait, *ranks in zip(NEEDED_BY_RANKS, *(rank[len(CASES) :] for rank in trained), strict=True):
        assert any(found for found, _ in ranks), wait

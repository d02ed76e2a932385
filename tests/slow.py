"""Slow transfers: whoever does not wait for one reads before the bytes are there."""

import asyncio
import random
import time
from typing import Any

import pytest

from offload.store import Store
from offload.streams import Lane

LONGEST_SECONDS = 0.004


def slow_down(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Delay every job of the lane of this name, the ``disk``, or ``everything``, by chance."""
    waits = random.Random(0)
    submit, transfer = Lane.submit, Store._transfer

    def slow_submit(lane: Lane, job: Any, after: Any = ()) -> Any:
        def slow_job() -> None:
            time.sleep(waits.uniform(0, LONGEST_SECONDS))
            job()

        return submit(lane, slow_job if what in (lane.name, "everything") else job, after)

    async def slow_transfer(store: Store, *args: Any, **kwargs: Any) -> None:
        if what in ("disk", "everything"):
            await asyncio.sleep(waits.uniform(0, LONGEST_SECONDS))
        await transfer(store, *args, **kwargs)

    monkeypatch.setattr(Lane, "submit", slow_submit)
    monkeypatch.setattr(Store, "_transfer", slow_transfer)

"""Who is to blame, from where the ranks stand; and how processes meet in a store that others used before."""

import os
import re
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from memplan.errors import LaunchError
from memplan.launch import Place, met
from offload.entered import Kind
from offload.standing import Entered, Standing, Verdict, blame
from offload.watchdog import Watchdog


def standing(rank: int = 0, **changes: Any) -> Standing:
    return Standing(**{"host": f"node{rank // 2}", "machine": f"node{rank // 2}", "pid": rank, **changes})


def test_the_one_to_blame_has_entered_fewer_and_does_not_wait() -> None:
    waits = Entered(40, "gather of h.3 of step 17", 61.0)
    standings = {
        0: standing(0, kinds={"gather": waits}),
        1: standing(1, kinds={"gather": Entered(41, "gather of h.4 of step 17", 60.0)}),
        2: standing(2, kinds={"gather": Entered(39, "gather of h.2 of step 17")}, doing="net.py:12, in forward"),
    }
    found = blame(standings, 60)
    assert found.rank == 2
    assert found.sentence == (
        "rank 2 (node1) has not entered 'gather of h.3 of step 17' for 61 s, where ranks 0, 1 wait; "
        "it is at net.py:12, in forward"
    )


def test_a_rank_that_waits_for_another_is_not_to_blame() -> None:
    """Rank 0 waits for rank 1 in a reduction, which waits in a gather for rank 2."""
    standings = {
        0: standing(0, kinds={"gather": Entered(9, "g", 70.0), "reduce": Entered(5, "reduce of h.1", 90.0)}),
        1: standing(1, kinds={"gather": Entered(9, "g", 65.0), "reduce": Entered(4, "reduce of h.2")}),
        2: standing(2, kinds={"gather": Entered(8, "f"), "reduce": Entered(4, "reduce of h.2")}),
    }
    assert blame(standings, 60).rank == 2


def test_a_rank_is_named_with_the_first_collective_of_a_step_that_it_has_not_entered() -> None:
    """A device waits in a gather: its host has given it reductions behind that, and waits in the agreement itself."""
    counts = {"agreement": 12, "gather": 99, "reduce": 56}
    standings = {
        0: standing(0, kinds={kind: Entered(n, f"{kind} of h.3 of step 12", 61.0) for kind, n in counts.items()}),
        1: standing(1, kinds={kind: Entered(n - 1, f"{kind} of h.2 of step 12") for kind, n in counts.items()}),
    }
    assert "rank 1 (node0) has not entered 'gather of h.3 of step 12' for" in blame(standings, 60).sentence


def test_a_rank_that_has_ended_well_too_early_is_named() -> None:
    standings = {
        0: standing(0, kinds={"loss": Entered(3, "mean of the loss of step 3", 61.0)}),
        1: standing(1, kinds={"loss": Entered(2, "mean of the loss of step 2")}, left=True),
    }
    assert "rank 1 (node0) has ended its training, and rank 0 waits for it" in blame(standings, 60).sentence


def test_where_all_are_in_the_same_collective_none_is_to_blame() -> None:
    both = {"reduce": Entered(3, "reduce of the root unit of step 1", 61.0)}
    found = blame({0: standing(0, kinds=both), 1: standing(1, kinds=both)}, 60)
    assert found.rank is None
    assert "all ranks wait in 'reduce of the root unit of step 1' for 60 s" in found.sentence


def test_what_a_rank_writes_is_what_others_read() -> None:
    store = dist.HashStore()
    dog = Watchdog(store, 0, 2)
    with dog.inside("gather", "gather", "h.1"):
        dog._write()
    assert dog._standings()[0].kinds["gather"].what == "gather of h.1"
    assert dog._standings()[0].kinds["gather"].waiting_seconds is not None
    assert dog.waited_seconds() > 0


@dataclass
class Event:
    """Of a device's stream."""

    reached: bool = False

    def query(self) -> bool:
        return self.reached


def test_a_rank_that_hangs_is_named_where_only_the_devices_of_the_others_wait() -> None:
    """As with NCCL: every call has returned, and the main threads may be in no collective."""
    store, timeout = dist.HashStore(), 0.1
    dogs = [Watchdog(store, rank, 3, timeout) for rank in range(3)]
    for dog in dogs:
        dog.step = 12
        units = ("h.1",) if dog.rank == 2 else ("h.1", "h.2", "h.3")
        for unit in units:
            with dog.inside("gather", "gather", unit, lambda reached=unit == "h.1": Event(reached)):
                pass
    for seconds in (0, 2 * timeout):
        time.sleep(seconds)
        for dog in dogs:
            dog._write()
    dogs[1]._look(time.monotonic())
    assert dogs[1].verdict is not None
    assert dogs[1].verdict.rank == 2
    sentence = r"rank 2 \(\S+\) has not entered 'gather of h.2 of step 12' for 0 s, where ranks 0, 1 wait; it is at "
    assert re.match(sentence, dogs[1].verdict.sentence)
    assert [dog._waits() for dog in dogs] == [True, True, False], "who waits also ends where the store is gone"


def test_a_device_that_comes_on_is_not_waited_for() -> None:
    kind, marks = Kind(), [Event(), Event(), Event()]
    for second, mark in enumerate(marks):
        began = kind.enter(("reduce", f"h.{second}", 3), second)
        kind.queue(mark, second)
        kind.leave(began, second)
    assert kind.entered(50.0) == Entered(1, "reduce of h.0 of step 3", 50.0)
    marks[0].reached = True
    assert kind.entered(51.0) == Entered(2, "reduce of h.1 of step 3", 0.0)
    assert kind.entered(56.0) == Entered(2, "reduce of h.1 of step 3", 5.0)
    marks[1].reached = marks[2].reached = True
    assert kind.entered(57.0) == Entered(3, "reduce of h.2 of step 3", None)
    assert kind.waited_seconds == 0, "of this thread"


def test_a_verdict_ends_the_process_also_where_nobody_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the launcher and its terminal are gone: what is printed then is a broken pipe."""
    read, written = os.pipe()
    os.close(read)
    codes: list[int] = []
    with os.fdopen(written, "w") as nobody:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, nobody)
        monkeypatch.setattr(os, "_exit", codes.append)
        dog = Watchdog(dist.HashStore(), 0, 2)
        dog.say(Verdict(1, "rank 1 is gone"))
        dog._end(1)
        monkeypatch.undo()
        with suppress(OSError):
            nobody.close()
    assert codes == [1]


def test_a_verdict_ends_the_process_also_where_what_is_said_last_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the lock of the events' file, while the main thread holds it and waits for the disk."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr("offload.watchdog.LEAVE_SECONDS", 0.1)
    dog, lock = Watchdog(dist.HashStore(), 0, 2), threading.Lock()
    dog.on_verdict = lock.acquire
    with lock:
        dog.say(Verdict(1, "rank 1 is gone"))
        dog._end(1)
    assert codes == [1]


def meet(store: dist.Store, world: int) -> list[str]:
    words = [""] * world

    def one(rank: int) -> None:
        words[rank] = met(store, Place(rank, world))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return words


def test_processes_that_are_started_again_share_a_word_that_those_before_did_not_have() -> None:
    store = dist.HashStore()
    dist.Store.set(store, "memplan/asks/1", "of a process that was killed before it had an answer")
    first, second = meet(store, 3), meet(store, 3)
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] != second[0]
    assert first[0]


def test_processes_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memplan.launch.JOINING", timedelta(seconds=0.2))
    with pytest.raises(LaunchError, match=r"of 3 processes these did not come within .*: rank 1, 2"):
        met(dist.HashStore(), Place(0, 3))

"""What finds races finds them, and nothing else: told of streams and events as torch's gpu trace tells of them."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.cuda._gpu_trace as gpu_trace

from offload.arena import page_aligned
from offload.store import Store
from offload.streams import Done, Lane
from tests.simulated_streams import simulate_streams
from tests.stream_races import TRAINING, Races
from tests.watched_engine import Waits, watch, watch_gpu

CPU = torch.device("cpu")
EVENT = 7


class Script:
    """One thread that gives work to streams, which are numbers."""

    def __init__(self) -> None:
        self.stream = 0
        self.races = Races(lambda: self.stream, simulated=True)

    def read(self, tensor: torch.Tensor, stream: int) -> None:
        self.stream = stream
        self.races.touched([tensor], [], "read")

    def write(self, tensor: torch.Tensor, stream: int) -> None:
        self.stream = stream
        self.races.touched([], [tensor], "write")

    def order(self, first: int, then: int) -> None:
        self.races.recorded(EVENT, first)
        self.races.waited(EVENT, then)


@pytest.mark.parametrize(("first", "then"), [("write", "read"), ("read", "write"), ("write", "write")])
def test_two_streams_race_unless_one_waits_for_the_other(first: str, then: str) -> None:
    for ordered in (False, True):
        script, tensor = Script(), torch.zeros(5000)
        getattr(script, first)(tensor, 1)
        if ordered:
            script.order(1, 2)
        getattr(script, then)(tensor, 2)
        assert bool(script.races.found) != ordered


def test_an_event_covers_what_came_before_it_and_nothing_else() -> None:
    script, tensor = Script(), torch.zeros(10)
    script.races.recorded(EVENT, 1)
    script.write(tensor, 1)
    script.races.waited(EVENT, 2)
    script.read(tensor, 2)
    assert script.races.found


def test_what_a_stream_waited_for_it_passes_on() -> None:
    script, tensor = Script(), torch.zeros(10)
    script.write(tensor, 1)
    script.order(1, 2)
    script.order(2, 3)
    script.read(tensor, 3)
    assert not script.races.found


def test_two_that_read_do_not_race_and_both_race_with_a_write() -> None:
    script, tensor = Script(), torch.zeros(10)
    for stream in (1, 2):
        script.read(tensor, stream)
    assert not script.races.found
    script.write(tensor, 3)
    assert len(script.races.found) == 2


def test_bytes_count_and_not_where_a_tensor_begins() -> None:
    script, whole = Script(), torch.zeros(5000)
    script.write(whole[:3000], 1)
    script.write(whole[3000:], 2)
    assert not script.races.found
    script.read(whole[2999:3000], 2)
    assert len(script.races.found) == 1


def test_a_thread_that_waited_has_what_it_does_next_behind_it() -> None:
    for waits in ("event_synchronized", "stream_synchronized", "device_synchronized", None):
        script, tensor = Script(), torch.zeros(10)
        script.write(tensor, 1)
        script.races.recorded(EVENT, 1)
        if waits == "device_synchronized":
            script.races.device_synchronized()
        elif waits is not None:
            getattr(script.races, waits)(EVENT if waits.startswith("event") else 1)
        script.read(tensor, 2)
        assert bool(script.races.found) == (waits is None)


def in_a_thread(work: Callable[[], None], name: str = "another") -> None:
    thread = threading.Thread(target=work, name=name)
    thread.start()
    thread.join()


def test_a_thread_that_waited_has_waited_for_itself_alone() -> None:
    script, tensor = Script(), torch.zeros(10)
    script.write(tensor, 1)
    script.races.recorded(EVENT, 1)
    in_a_thread(lambda: script.races.event_synchronized(EVENT))
    script.read(tensor, 2)
    assert script.races.found


def test_what_a_thread_knows_it_tells_by_a_future(monkeypatch: pytest.MonkeyPatch) -> None:
    script, tensor, told = Script(), torch.zeros(10), Future[None]()
    watch(monkeypatch, script.races, Waits())

    def wait_and_tell() -> None:
        script.races.event_synchronized(EVENT)
        told.set_result(None)

    script.write(tensor, 1)
    script.races.recorded(EVENT, 1)
    in_a_thread(wait_and_tell)
    told.result()
    script.read(tensor, 2)
    assert not script.races.found


@pytest.mark.parametrize("how", ["waited", "record_stream", None])
def test_memory_is_not_freed_under_another_stream(how: str | None) -> None:
    script, tensor = Script(), torch.zeros(10)
    script.write(tensor, 0)
    script.order(0, 1)
    script.read(tensor, 1)
    if how == "waited":
        script.order(1, 0)
    elif how == "record_stream":
        script.races.lent(tensor)
    del tensor
    assert bool(script.races.found) == (how is None)


def test_what_torch_tells_of_a_gpu_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch._C, "_activate_gpu_trace", lambda: None)
    races, memory = watch_gpu(monkeypatch), page_aligned(4096)
    races.on_host(memory, tier=True)
    races.touched([], [memory], "write")  # by this thread, at once
    gpu_trace.EventRecordCallbacks.fire_callbacks(EVENT, 1)
    in_a_thread(lambda: gpu_trace.EventWaitCallbacks.fire_callbacks(EVENT, 2))
    assert races.clock("stream 0x2") == {TRAINING: 1}
    told = ("EventSynchronization", (EVENT,)), ("StreamSynchronization", (1,)), ("DeviceSynchronization", ())
    for number, (kind, what) in enumerate(told):
        hear = getattr(gpu_trace, f"{kind}Callbacks").fire_callbacks
        in_a_thread(lambda hear=hear, what=what: hear(*what), f"thread {number}")
        assert races.clock(f"thread {number}") == {TRAINING: 1}
    gpu_trace.MemoryDeallocationCallbacks.fire_callbacks(memory.data_ptr())
    assert not races.found


@pytest.mark.parametrize("waits", [True, False])
def test_a_lane_and_the_training_thread_race_unless_one_waits(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    watch(monkeypatch, races := simulate_streams(monkeypatch), Waits())
    with races.thread(TRAINING):
        source, target = torch.ones(10), torch.zeros(10)
        lane = Lane("up", CPU)
        done = lane.copy(target, source, after=[Done.now(CPU)])
        if waits:
            done.wait()
        else:
            done._host_part()
        assert target[3:].sum() == 7
        lane.close()
    reports = list(races.found.values())
    assert len(reports) == (0 if waits else 1)
    assert all("writes on the stream of up: copy_ from offload/streams.py" in r and "sum from" in r for r in reports), (
        reports
    )


@pytest.mark.parametrize("waits", [True, False])
def test_the_disk_and_the_host_race_unless_a_ticket_is_waited_for(
    waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch, races := simulate_streams(monkeypatch), Waits())
    memory = page_aligned(4096)
    races.on_host(memory, tier=True)
    store = Store(tmp_path, 4096, 4096)
    with races.thread(TRAINING):
        ticket = store.write(store.take(4096), memory)
        if waits:
            ticket.result()
        memory.add_(1)
    store.close()
    assert bool(races.found) != waits

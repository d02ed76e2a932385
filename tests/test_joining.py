"""How ranks come together: who is late is waited for as at a start, and named."""

import re
import time
from multiprocessing.synchronize import Barrier

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from memplan import launch
from offload import watchdog
from offload.engine import Engine
from tests.models import GPT
from tests.plans import G, plan_for
from tests.ranks import free_port, on_ranks


def build_late(rank: int, world: int, seconds: float) -> float:
    """For how long the engine's making waits, in a training whose collectives wait for less."""
    watchdog.SILENT_SECONDS = 3.0  # this process ends after it
    assert watchdog.begin(timeout_seconds=0.5).backstop("gather").total_seconds() < seconds
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


def build_never(rank: int, world: int) -> None:
    watchdog.PATIENT_SECONDS = 3.0
    watchdog.begin(timeout_seconds=0.5)
    if rank == 1:
        time.sleep(60)
    model = GPT(layers=1)
    Engine(model, plan_for(model, ((G, G, G),), gpus=world, zero_stage=3))


def test_a_rank_that_never_comes_to_the_first_meeting_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="exit codes"):
        on_ranks(2, build_never)
    assert re.search(r"memplan: rank 1 .*has not entered 'making the groups' .*rank 0 waits", capfd.readouterr().err)


def join(rank: int, port: int, started: Barrier) -> None:
    launch.LATE_SECONDS = 1.0
    started.wait()  # a process may take longer than that to start
    if rank == 1:
        time.sleep(6)
    with launch.joined(launch.Place(rank, 3, rank, 3, port=port)):
        pass


@pytest.mark.parametrize("hosted", [False, True])
def test_the_first_rank_says_once_whom_it_waits_for(hosted: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Whether the store is its own or, as with torchrun and --nproc, the launcher's."""
    port, store = free_port(), None
    if hosted:
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    environment = {"TORCHELASTIC_USE_AGENT_STORE": str(hosted)}
    with pytest.MonkeyPatch.context() as patch:
        for name, text in environment.items():
            patch.setenv(name, text)
        context = mp.get_context("spawn")
        started = context.Barrier(3)
        processes = [context.Process(target=join, args=(rank, port, started)) for rank in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    said = [line for line in capfd.readouterr().err.splitlines() if "memplan: rank 0 waits for" in line]
    assert len(said) == 1
    assert "waits for rank 1 to come:" in said[0]
    del store

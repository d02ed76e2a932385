"""Which of several processes this one is: from torchrun, Kubernetes or Slurm."""

from collections.abc import Iterator

import pytest

from memplan.errors import LaunchError
from memplan.launch import Place, joined
from memplan.processes import run_in_processes, without_options
from offload.ranks import CONNECTIONS, local_index

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
    "SLURM_JOB_ID": "123456",
}  # fmt: skip


def test_a_process_that_nobody_placed_is_alone_and_speaks() -> None:
    assert Place.here({}) == Place()
    assert Place().speaks


def test_torchruns_names_are_read() -> None:
    assert Place.here(TORCHRUN) == Place(3, 4, 1, 4, "node1", 29500)
    assert not Place.here(TORCHRUN).speaks
    assert Place.here({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}).nodes == 2


def test_slurms_names_are_read_where_torchruns_are_missing() -> None:
    place = Place.here(SLURM)
    assert (place.rank, place.world, place.local_rank, place.master) == (5, 8, 1, "10.0.0.7")
    assert place.port == Place.here({**SLURM, "SLURM_PROCID": "0"}).port
    assert Place.here({**SLURM, **TORCHRUN}) == Place.here(TORCHRUN)
    assert Place.here({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "1234"}).port == 1234


def test_pods_of_one_process_each_need_no_local_rank() -> None:
    """What Kubernetes' PyTorchJob sets, where no torchrun is in between."""
    place = Place.here({name: text for name, text in TORCHRUN.items() if name != "LOCAL_RANK"})
    assert (place.rank, place.local_rank, place.local_world, place.nodes) == (3, 0, 1, 4)


@pytest.mark.parametrize(("listed", "nodes"), [("4(x2)", 2), ("8", 1), ("2(x4)", 4), ("2,3(x2)", 2)])
def test_slurms_list_of_tasks_says_how_many_nodes_there_are(listed: str, nodes: int) -> None:
    assert Place.here({**SLURM, "SLURM_STEP_TASKS_PER_NODE": listed, "SLURM_NTASKS_PER_NODE": "1"}).nodes == nodes


def test_a_slurm_script_outside_of_srun_is_told_how_to_start() -> None:
    script = {name: text for name, text in SLURM.items() if name != "SLURM_LAUNCH_NODE_IPADDR"}
    with pytest.raises(LaunchError, match=r"Slurm job of 8 tasks.*srun.*--nproc"):
        Place.here(script)
    with pytest.raises(LaunchError, match=r"SLURM_NTASKS_PER_NODE is 'x'"):
        Place.here({**SLURM, "SLURM_NTASKS_PER_NODE": "x"})


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}, "env://"),
        ({"MASTER_PORT": "1234"}, "tcp://10.0.0.7:1234"),
        ({}, "tcp://10.0.0.7:18456"),
    ],
)
def test_what_slurm_leaves_out_of_the_address_is_not_asked_of_torch(
    given: dict[str, str], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def rendezvous(url: str, *_: int) -> Iterator[None]:
        asked.append(url)
        raise RuntimeError("nobody is there")

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, text in {**given, **CONNECTIONS, "LOCAL_RANK": "1"}.items():  # ``joined`` would leave the last two behind
        monkeypatch.setenv(name, text)
    monkeypatch.setattr("torch.distributed.rendezvous", rendezvous)
    with pytest.raises(LaunchError, match="nobody is there"), joined(Place.here({**SLURM, **given})):
        pass
    assert asked == [where]


@pytest.mark.parametrize(("seen", "index"), [(1, 0), (4, 3)])
def test_a_process_that_sees_one_gpu_takes_it(seen: int, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with Slurm's --gpus-per-task."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    assert local_index() == index


def test_slurm_tasks_that_go_round_the_nodes_are_refused() -> None:
    block = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    assert Place.here(block).local_world == 4  # task 5 is number 1 of the second node
    with pytest.raises(LaunchError, match=r"task 5 is number 2 of the 4 .*--distribution=block"):
        Place.here({**block, "SLURM_LOCALID": "2"})
    first = {**block, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert Place.here({**first, "SLURM_DISTRIBUTION": "block"}).speaks
    with pytest.raises(LaunchError, match=r"task 0 is number 0 of the 4 .*--distribution=block"):
        Place.here({**first, "SLURM_DISTRIBUTION": "cyclic:cyclic"})


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(LaunchError, match="--nproc is 4, and this machine has 2 GPUs"):
        run_in_processes(4, ["train"])


def test_a_slurm_job_of_one_task_is_alone() -> None:
    assert Place.here({**SLURM, "SLURM_NTASKS": "1"}) == Place()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"RANK": "4"}, r"rank 4 .* of 4; start"),
        ({"LOCAL_RANK": "7"}, r"local 7"),
        ({"WORLD_SIZE": ""}, r"WORLD_SIZE is not set.*torchrun"),
        ({"RANK": "one"}, r"RANK is 'one'; it must be a number"),
        ({"MASTER_ADDR": ""}, r"MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE is 'two'; it must be a number"),
        ({"LOCAL_WORLD_SIZE": "0"}, r"local 1 of 0"),
    ],
)
def test_an_environment_that_can_not_be_is_refused(change: dict[str, str], sentence: str) -> None:
    with pytest.raises(LaunchError, match=sentence):
        Place.here({**TORCHRUN, **change})


def test_processes_get_the_command_line_without_what_started_them() -> None:
    words = ["train", "net.py", "--nproc", "2", "--steps=3", "--max-restarts=1", "--out", "run", "--nproc=4"]
    assert without_options(words, "--nproc", "--max-restarts") == ["train", "net.py", "--steps=3", "--out", "run"]


def test_how_often_torchrun_has_started_a_process_is_read() -> None:
    again = Place.here({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "3"})
    assert (again.restarts, again.max_restarts) == (2, 3)

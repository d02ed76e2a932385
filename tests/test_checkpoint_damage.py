"""Whatever stops a process or harms a file: what is loaded is whole, and what was there before stays."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload import checkpoint, saver, snapshot
from offload.checkpoint import checked, found, newest_whole, opened
from offload.engine import Engine
from offload.errors import CheckpointError
from tests.loops import losses_of
from tests.models import GPT, batches
from tests.plans import EVERY_TIER, RESIDENT, plan_for
from tests.test_checkpoint import engine_for

ROOT = Path(__file__).parent.parent
FILES = ("manifest.json", "training.json", "rest.safetensors", "rank-0.safetensors")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    torch.manual_seed(0)
    model = GPT(layers=2)
    with engine_for(model, plan_for(model, EVERY_TIER, tmp_path)) as engine:
        losses_of(engine, batches(1))
        yield engine


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = GPT(layers=1)
    with engine_for(model, plan_for(model, (RESIDENT,))) as engine:
        return engine.save_checkpoint(tmp_path_factory.mktemp("whole")).wait()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FILES), st.integers(0, 1 << 60), st.integers(1, 255), st.booleans())
def test_one_byte_that_is_not_as_it_was_is_found(whole: Path, name: str, place: int, flip: int, cut: bool) -> None:
    file = whole / name
    data = file.read_bytes()
    place %= len(data)
    changed = data[:place] if cut else data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :]
    file.write_bytes(changed)
    try:
        with pytest.raises(CheckpointError, match=name):
            checked(whole)
    finally:
        file.write_bytes(data)
    checked(whole)


def test_a_damaged_checkpoint_changes_nothing_and_the_others_are_named(engine: Engine, tmp_path: Path) -> None:
    before = engine.state_dict()
    engine.save_checkpoint(tmp_path / "c").wait()
    losses_of(engine, batches(1))
    path = engine.save_checkpoint(tmp_path / "c").wait()
    now = engine.state_dict()
    with (path / "rank-0.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"damaged: it has 1000 bytes.*by their tags: step-1"):
        engine.load_checkpoint(tmp_path / "c")
    assert all(torch.equal(t, now[n]) for n, t in engine.state_dict().items())
    good, damaged = newest_whole(tmp_path / "c")
    assert good.path.name == "step-1"
    assert len(damaged) == 1
    assert "step-2" in damaged[0]
    engine.load_checkpoint(tmp_path / "c", "step-1")
    assert all(torch.equal(t, before[n]) for n, t in engine.state_dict().items())


def test_what_latest_names_must_be_there(engine: Engine, tmp_path: Path) -> None:
    engine.save_checkpoint(tmp_path / "c").wait()
    (tmp_path / "c" / "latest").write_text("step-9\n")
    with pytest.raises(CheckpointError, match=r"step-9.*by their tags: step-1"):
        engine.load_checkpoint(tmp_path / "c")
    assert newest_whole(tmp_path / "c")[0].path.name == "step-1"


@pytest.mark.parametrize("tag", ["", ".", "../x", "latest", ".hidden"])
def test_a_tag_names_a_directory(tag: str, engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tag"):
        engine.save_checkpoint(tmp_path / "c", tag)


def test_only_so_many_are_kept_and_never_one_with_a_tag_of_its_own(engine: Engine, tmp_path: Path) -> None:
    for number in range(4):
        engine.save_checkpoint(tmp_path / "c", "best" if number == 1 else None, keep=2).wait()
        losses_of(engine, batches(1))
    assert list(found(tmp_path / "c")) == ["step-4", "step-3", "best"]
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"step-4", "step-3", "best", "latest"}


class PowerCut(BaseException):
    """The machine stops here."""


STOPS = range(1, 20)


def cut_power(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Raise PowerCut instead of the system call of this number; returns what was called."""
    called: list[str] = []

    def counting(name: str, call: Callable) -> Callable:
        def counted(*args: object, **kwargs: object) -> object:
            called.append(name)
            if len(called) >= after:
                raise PowerCut
            return call(*args, **kwargs)

        return counted

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, counting(name, getattr(os, name)))
    monkeypatch.setattr(Path, "rename", counting("rename", Path.rename))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", counting("rmtree", checkpoint.shutil.rmtree))
    return called


@pytest.mark.parametrize("same_tag", [False, True])
def test_wherever_the_power_is_cut_there_is_a_whole_checkpoint(
    same_tag: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPT(layers=1)
    reached_the_end = False
    for after in STOPS:
        directory = tmp_path / str(after)
        with engine_for(model, plan_for(model, (RESIDENT,))) as engine:
            engine.save_checkpoint(directory, "x", {"number": 1}).wait()
            with monkeypatch.context() as patched:
                called = cut_power(patched, after)
                saving = engine.save_checkpoint(directory, "x" if same_tag else "y", {"number": 2})
                saving.settle()
                reached_the_end = saving.error is None
            numbers = [checked(path).training["client_state"]["number"] for path in found(directory).values()]
            assert 1 in numbers or numbers == [2], called
            assert newest_whole(directory)[1] == [], "nothing that is there is damaged"
            # And the next one is made as if nothing had been.
            engine.save_checkpoint(directory, "x", {"number": 3}).wait()
            assert opened(directory).training["client_state"] == {"number": 3}
            assert not list(directory.glob(".*"))
        if reached_the_end:
            return
    pytest.fail("so many system calls were not expected")


def test_everything_is_synced_before_it_is_renamed(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    real_sync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        calls.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        real_sync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        calls.append(("rename", target.name))
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    engine.save_checkpoint(tmp_path / "c", "t").wait()
    synced = [name for call, name in calls[: calls.index(("rename", "t"))] if call == "fsync"]
    assert set(synced) == {*FILES, ".t.partial"}
    assert synced[-1] == ".t.partial", "the directory after its files"
    assert calls[-4:] == [("fsync", "c"), ("fsync", ".latest"), ("rename", "latest"), ("fsync", "c")]


@pytest.mark.parametrize("call", ["posix_fallocate", "write", "fsync"])
def test_a_full_disk_leaves_the_old_checkpoint_and_training_alive(
    call: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "c"
    engine.save_checkpoint(directory).wait()
    losses_of(engine, batches(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        saving = engine.save_checkpoint(directory)
        losses = losses_of(engine, batches(3))
        with pytest.raises(CheckpointError, match="No space left on device; what was there before is still there"):
            saving.wait()
    assert all(map(torch.isfinite, torch.tensor(losses)))
    assert list(found(directory)) == ["step-1"]
    assert {p.name for p in directory.iterdir()} == {"step-1", "latest"}
    assert engine.save_checkpoint(directory).wait().name == "step-5"


def test_an_error_that_nobody_asks_for_is_a_warning(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c").write_text("a file, not a directory")
    engine.save_checkpoint(tmp_path / "c").settle()
    with pytest.warns(RuntimeWarning, match="was not saved"):
        engine.save_checkpoint(tmp_path / "d").wait()


def test_the_next_update_waits_until_what_is_saved_was_copied_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    data, go_on = batches(4), threading.Event()
    real_write = saver._write

    def slow_write(*args: object) -> None:
        assert go_on.wait(60)
        real_write(*args)

    model = GPT(layers=2)
    with engine_for(model, plan_for(model, EVERY_TIER, tmp_path)) as engine:
        losses_of(engine, data[:2])
        before = engine.state_dict()
        with monkeypatch.context() as patched:
            # All pieces fit into memory: training goes on though not one byte was written.
            patched.setattr(saver, "staging_bytes", lambda *_: 1 << 30)
            patched.setattr(saver, "_write", slow_write)
            saving = engine.save_checkpoint(tmp_path / "c")
            losses_of(engine, data[2:])
            engine.finish()
            assert not saving.done
            go_on.set()
            saving.wait()
        engine.load_checkpoint(tmp_path / "c")
        assert all(torch.equal(t, before[n]) for n, t in engine.state_dict().items())


def test_copies_take_the_memory_they_were_given_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    real_take = snapshot.Staging.take

    def take(self: snapshot.Staging, size_bytes: int) -> torch.Tensor:
        buffer = real_take(self, size_bytes)
        held.append(self._held_bytes)
        return buffer

    monkeypatch.setattr(snapshot.Staging, "take", take)
    model = GPT(layers=4)
    with engine_for(model, plan_for(model, EVERY_TIER, tmp_path)) as engine:
        losses_of(engine, batches(1))
        before = engine.state_dict()
        saving = engine.save_checkpoint(tmp_path / "c")
        losses_of(engine, batches(2))
        saving.wait()
        state = sum(p.size_bytes for s in engine.states for p in snapshot.pieces_of(s, engine.plan.state_format, 5000))
        assert max(held) <= saving.staging_bytes <= state / 2
        engine.load_checkpoint(tmp_path / "c")
        assert all(torch.equal(t, before[n]) for n, t in engine.state_dict().items())


def test_ctrl_c_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(layers=4)
    engine = engine_for(model, plan_for(model, EVERY_TIER, tmp_path))
    monkeypatch.setattr(snapshot.CopiedPiece, "write", lambda *_: threading.Event().wait(0.05))
    with pytest.raises(KeyboardInterrupt), engine:
        saving = engine.save_checkpoint(tmp_path / "c")
        raise KeyboardInterrupt
    with pytest.raises(CheckpointError, match="training ended before"):
        saving.wait()
    assert found(tmp_path / "c") == {}


def test_killed_at_random_moments_while_saving_it_resumes_to_the_same_losses(tmp_path: Path) -> None:
    out = tmp_path / "killed.json"
    words = ["-m", "benchmarks.kill_and_resume", "--times", "4", "--seed", "11", "--out", str(out)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert '"loads": 4,' in out.read_text()

"""Who keeps the other ranks waiting: a thread on every rank that says where it is, and looks at where the others are.

[Note: who is to blame]
Every second a rank writes into the store of torch.distributed how many collectives of each kind it has entered, and
which one it is in. Nobody reads that while all goes well, but for one rank each that looks whether the next one still
writes. Where a rank has been inside of one collective for too long, it reads them all, and the one to blame is the rank
that has entered fewer than those who wait, and does not wait itself. A rank that fails says so before it goes; one that
was killed is known by its process, or by its silence. Whoever finds out first writes the verdict into the store, if
there is none yet, and that one says it; the others read it within a second, and end. So there is one sentence.

In a step this costs a tuple and two looks at the clock a collective. Whoever waits in C++ can not be woken: a process
that does not end by itself soon after a verdict is ended here. A call of NCCL returns as soon as the device has been
given the collective, and who waits for its result is the device, until its queue is full and the next kernel, of
anything, can not be given to it. So a rank counts as inside until the device has done it: ``offload/entered.py``.
"""

import json
import os
import select
import signal
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from pathlib import Path

import psutil
import torch.distributed as dist

from offload.entered import Kind, Mark
from offload.errors import RankLost
from offload.standing import Standing, Verdict, blame, name

TIMEOUT_SECONDS = 300.0
"""After which a rank that keeps the others waiting in a collective ends the training."""
PATIENT_SECONDS = 1800.0
"""The same, at least, for what one rank does while the others wait: planning, first values, writing a checkpoint."""
PATIENT = ("start", "checkpoint")
BEAT_SECONDS = 1.0
SILENT_SECONDS = 20.0
"""After which a rank that writes nothing counts as gone."""
STOPPED = "its process has stopped, or its machine can not be reached"
GRACE_SECONDS = 2.0
"""For which a launcher that knows more may say why a connection broke."""
LEAVE_SECONDS = 5.0
"""For which a process may end by itself after a verdict."""
WAITS_SECONDS = 1.0
"""In one collective, after which a rank is said to wait."""
VERDICT = "verdict"
ENDED_BY_SIGNAL = 128 + signal.SIGTERM


class Watchdog:
    """The watching thread of one rank. ``step`` is the one that is computed, for whoever reads of it."""

    def __init__(self, store: dist.Store, rank: int, world: int, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.rank, self.world, self.timeout_seconds = rank, world, timeout_seconds
        self.step = 0
        self.on_verdict: Callable[[], None] = lambda: None
        """Called before the process is ended from here."""
        self.on_wait: Callable[[str, float], None] = lambda _place, _seconds: None
        """Called every second in which this rank waits in a collective: which one, and for how long so far."""
        self.verdict: Verdict | None = None
        self._mine, self._said = False, False
        self._store = store
        self.name = f"rank {rank} ({socket.gethostname()})"
        self._kinds: dict[str, Kind] = {}
        self._beat = 0
        self._next_beat, self._next_came, self._looked = -1, 0.0, 0.0
        self._broken_since: float | None = None
        self._closing, self._known = threading.Event(), threading.Event()
        self._signals: socket.socket | None = None
        self._woken: socket.socket | None = None
        self._thread = threading.Thread(target=self._watch, name="memplan-watchdog", daemon=True)
        self._guard = threading.Thread(target=self._watch_store, name="memplan-store", daemon=True)

    def start(self) -> "Watchdog":
        """Begin to watch."""
        self._write()
        self._thread.start()
        self._guard.start()
        return self

    def listen(self) -> "Watchdog":
        """Be told of SIGTERM, by which launchers end the others; in the main thread, before ``start``."""
        self._signals, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)  # the descriptor tells, also while the main thread is in C++
        return self

    def close(self) -> None:
        """This rank has ended well, or has said why not."""
        self._closing.set()
        if self._woken is not None:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._woken.send(b"\0")
        self._thread.join(SILENT_SECONDS)
        if self._thread.is_alive():  # it waits for a store that does not answer
            return
        with suppress(Exception):  # the process that had the store may have gone first
            self._write(left=self.verdict is None)

    @contextmanager
    def inside(self, kind: str, verb: str, unit: str = "", mark: Callable[[], Mark] | None = None) -> Iterator[None]:
        """Inside of a collective. Where the connection breaks it raises RankLost, when it is known why.

        ``mark`` gives what tells, behind it, whether the device has done it; None where the host waits for that.
        """
        track = self._kinds.get(kind) or self._kinds.setdefault(kind, Kind())
        began = track.enter((verb, unit, self.step), time.monotonic())
        try:
            yield
            if mark is not None:
                track.queue(mark(), time.monotonic())
        except Exception as error:
            self._broken_since = self._broken_since or time.monotonic()
            if not self._known.wait(GRACE_SECONDS + SILENT_SECONDS + 2 * BEAT_SECONDS):
                self.say(Verdict(None, f"the connection between ranks broke: {str(error).splitlines()[0]}"))
            assert self.verdict is not None
            raise RankLost(self.verdict.sentence) from error
        finally:
            track.leave(began, time.monotonic())

    def patience_seconds(self, kind: str) -> float:
        """For how long a rank may keep the others waiting in a collective of this kind."""
        return max(self.timeout_seconds, PATIENT_SECONDS) if kind in PATIENT else self.timeout_seconds

    def backstop(self, kind: str) -> timedelta:
        """For a group of such collectives: when torch is to give up where this did not, which over NCCL aborts it."""
        return timedelta(seconds=2 * self.patience_seconds(kind) + SILENT_SECONDS)

    def waited_seconds(self) -> float:
        """Inside of collectives so far."""
        return sum(track.waited_seconds for track in list(self._kinds.values()))

    def blames(self, sentence: str) -> bool:
        """This rank ends for the reason that it says; whether it is the first, who must tell people so."""
        return self._claim(Verdict(self.rank, f"{self.name} failed: {sentence}"))

    def be_ended(self) -> None:
        """Wait until the rank that failed has gone first, so that nobody takes this one for it; then end from here."""
        self._thread.join()

    def say(self, verdict: Verdict) -> None:
        """This is why training ends, unless somebody has said so before; it is printed then."""
        if self._claim(verdict):
            self._print()

    def _claim(self, verdict: Verdict) -> bool:
        if self.verdict is None:
            mine = json.dumps({**asdict(verdict), "by": self.rank})
            try:
                there = self._store.compare_set(VERDICT, "", mine).decode()
            except Exception:  # noqa: BLE001 - the store went with the process that had it
                there = mine
            self._mine = there == mine
            self._learn(Verdict.from_json(there))
        return self._mine

    def _learn(self, verdict: Verdict) -> None:
        self.verdict = verdict
        _tell_torchrun(verdict.sentence)
        self._known.set()

    def _print(self) -> None:
        if self._mine and not self._said and self.verdict is not None:
            self._said = True
            with suppress(OSError, ValueError):  # nobody may be there to read it
                print(f"memplan: {self.verdict.sentence}", file=sys.stderr, flush=True)

    # The thread

    def _watch(self) -> None:
        failing_since: float | None = None
        while not self._pause(BEAT_SECONDS):
            try:
                self._look(time.monotonic())
                failing_since = None
            except Exception:  # noqa: BLE001 - torch has several for a store that can not be reached
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > 2 * GRACE_SECONDS and self._waits():
                    self._without_store("is gone")
            if self.verdict is not None:
                # A rank that fails by itself has to say why, and to close what it has.
                if not self._pause(LEAVE_SECONDS * (3 if self._mine and not self._said else 1)):
                    self._end(1)
                return

    def _pause(self, seconds: float) -> bool:
        """Whether to end, known after at most so many seconds. SIGTERM ends the process from here."""
        if self._signals is None:
            return self._closing.wait(seconds)
        until = time.monotonic() + seconds
        while not self._closing.is_set() and (left := until - time.monotonic()) > 0:
            if select.select([self._signals], [], [], left)[0] and signal.SIGTERM in self._signals.recv(64):
                with suppress(Exception):
                    self._read_verdict()
                    if self.verdict is None and (gone := self._gone()) is not None:
                        self.say(gone)
                if self.verdict is None:
                    self.verdict = Verdict(None, "ended by SIGTERM")
                self._end(ENDED_BY_SIGNAL)
        return self._closing.is_set()

    def _end(self, code: int) -> None:
        """End the process, whatever its main thread waits for, which may hold a lock of what is said last."""
        assert self.verdict is not None
        with suppress(RuntimeError):  # no thread is to be had any more
            (speaking := threading.Thread(target=self._say_last, daemon=True)).start()
            speaking.join(LEAVE_SECONDS)
        os._exit(code)

    def _say_last(self) -> None:
        for last in (self._print, self.on_verdict, sys.stdout.flush):
            with suppress(Exception):  # somebody waits for the others to end
                last()

    def _look(self, now: float) -> None:
        self._write()
        self._read_verdict()
        if self.verdict is not None:
            return
        entered = {kind: track.entered(now) for kind, track in list(self._kinds.items())}
        waiting = {kind: e.waiting_seconds for kind, e in entered.items() if e.waiting_seconds is not None}
        longest = max(waiting, key=lambda kind: waiting[kind], default="")
        if waiting.get(longest, 0.0) > WAITS_SECONDS:
            self.on_wait(entered[longest].what, waiting[longest])
        found = self._next_is_silent(now)
        if self._broken_since is not None and now - self._broken_since > GRACE_SECONDS:
            found = self._gone() or found
        for kind, seconds in waiting.items():
            patience = self.patience_seconds(kind)
            if found is None and seconds > patience:
                found = blame(self._standings(), patience)
        if found is not None:
            self.say(found)

    def _next_is_silent(self, now: float) -> Verdict | None:
        """Each rank looks after the next one, so however many there are, it costs each the same."""
        after = (self.rank + 1) % self.world
        standing = self._standings([after]).get(after)
        slept, self._looked = now - self._looked > SILENT_SECONDS / 2, now
        if standing is None or standing.left:
            return None
        if standing.beat != self._next_beat or slept:
            self._next_beat, self._next_came = standing.beat, now
        if standing.machine == machine() and _is_gone(standing.pid):
            self._broken_since = self._broken_since or now
        if now - self._next_came < SILENT_SECONDS:
            return None
        said = f"is silent for {SILENT_SECONDS:.0f} s: {STOPPED}"
        return Verdict(after, f"{name(after, standing)} {said}")

    def _gone(self) -> Verdict | None:
        """A rank of this machine whose process is not there any more, or one that has ended before the others."""
        for rank, standing in self._standings().items():
            if standing.left:
                return Verdict(rank, f"{name(rank, standing)} has ended its training, and others have not")
            if standing.machine == machine() and _is_gone(standing.pid):
                said = f"is gone: process {standing.pid} ended without a word, as when it is killed or crashes"
                return Verdict(rank, f"{name(rank, standing)} {said}")
        return None

    def _waits(self) -> bool:
        now = time.monotonic()
        return any(track.entered(now).waiting_seconds is not None for track in list(self._kinds.values()))

    def _watch_store(self) -> None:
        """Whoever asks a store whose process is stopped, or whose machine is lost, waits for ever."""
        beat = looks = 0  # and not seconds: this process may have been stopped as well
        while not self._closing.wait(BEAT_SECONDS):
            beat, looks = self._beat, looks + 1 if beat == self._beat else 0
            if looks * BEAT_SECONDS >= SILENT_SECONDS and self._thread.is_alive():
                self._without_store(f"is silent for {SILENT_SECONDS:.0f} s: {STOPPED}")
                if not self._closing.wait(LEAVE_SECONDS):
                    self._end(1)

    def _without_store(self, said: str) -> None:
        where = os.environ.get("MASTER_ADDR", "its machine")
        launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        self._learn(Verdict(None if launched else 0, f"{'the launcher' if launched else 'rank 0'} ({where}) {said}"))
        # Nobody can claim it: the first of each machine tells.
        self._mine = os.environ.get("LOCAL_RANK") == "0" or self.rank == 1
        self._print()

    def _write(self, left: bool = False) -> None:
        self._beat += 1
        now = time.monotonic()
        tracks = list(self._kinds.items())
        quiet = now - max((track.changed for _, track in tracks), default=now)
        doing = _place_of_main_thread() if quiet > self.timeout_seconds / 2 else ""
        kinds = {kind: track.entered(now) for kind, track in tracks}
        standing = Standing(socket.gethostname(), machine(), os.getpid(), self._beat, left, kinds, doing)
        self._store.set(str(self.rank), json.dumps(asdict(standing)))

    def _read_verdict(self) -> None:
        if self.verdict is None and self._store.check([VERDICT]):
            self._learn(Verdict.from_json(self._store.get(VERDICT)))

    def _standings(self, ranks: Sequence[int] | None = None) -> dict[int, Standing]:
        wanted = [r for r in (range(self.world) if ranks is None else ranks) if self._store.check([str(r)])]
        texts = self._store.multi_get([str(r) for r in wanted]) if wanted else []
        return {rank: Standing.from_json(text) for rank, text in zip(wanted, texts, strict=True)}


_current: Watchdog | None = None


def begin(
    store: dist.Store | None = None, timeout_seconds: float = TIMEOUT_SECONDS, *, listen: bool = False
) -> Watchdog:
    """Watch the ranks of torch.distributed's default group, from this process.

    They write into ``store``, which must be new to them; torch.distributed's own, if not given.
    """
    global _current  # a process has one place among the ranks, as torch.distributed has it
    shared = dist.distributed_c10d._get_default_store() if store is None else store
    dog = Watchdog(own_client(shared), dist.get_rank(), dist.get_world_size(), timeout_seconds)
    _current = (dog.listen() if listen else dog).start()
    return _current


def end() -> None:
    """Watch no more."""
    global _current
    if _current is not None:
        _current.close()
    _current = None


def current() -> Watchdog | None:
    """The one of this process, if it watches."""
    return _current


def in_step(step: int) -> None:
    """The step that is computed from now on."""
    if _current is not None:
        _current.step = step


def own_client(store: dist.Store) -> dist.Store:
    """The same store, where another thread's questions do not wait for each other."""
    own: dist.Store = store.clone()  # type: ignore[attr-defined]
    own.set_timeout(timedelta(seconds=SILENT_SECONDS / 2))
    return dist.PrefixStore("watchdog", own)


@cache
def machine() -> str:
    """Equal for processes that see each other."""
    with suppress(OSError):
        return f"{socket.gethostname()}/{Path('/proc/self/ns/pid').stat().st_ino}"
    return f"{socket.gethostname()}/{os.getpid()}"


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _place_of_main_thread() -> str:
    """The innermost line of a person's own code, or of any."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = [f for f, _ in traceback.walk_stack(frame)] if frame is not None else []
    own = [f for f in frames if not f.f_code.co_filename.startswith(_NOT_A_PERSONS)]
    chosen = next(iter(own or frames), None)
    if chosen is None:
        return ""
    code = chosen.f_code
    return f"{Path(code.co_filename).name}:{chosen.f_lineno}, in {code.co_name}"


_ROOT = Path(__file__).parent.parent
_NOT_A_PERSONS = (
    *(str(_ROOT / package) + os.sep for package in ("memplan", "offload", "profiler")),
    *{sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")},
    "<",
)


def _tell_torchrun(sentence: str) -> None:
    """Its summary shows what a rank has left in this file."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not Path(path).exists():
        extra = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": sentence, "extraInfo": extra}}))

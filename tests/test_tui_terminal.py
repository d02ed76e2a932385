"""The dashboard in a real terminal, driven through tmux."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest

from tests.fake_run import make_events, make_plan, run_event, step_event

pytestmark = [
    pytest.mark.terminal,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
]
ROOT = Path(__file__).parent.parent
WATCH = "import sys, pathlib, tui; sys.exit(tui.watch(pathlib.Path(sys.argv[1])))"


class Terminal:
    """A tmux server of its own with one session, in which one command runs."""

    def __init__(self, run_dir: Path) -> None:
        self._socket = f"memplan-test-{uuid.uuid4().hex[:8]}"
        self._code = run_dir / "code"
        script = run_dir / "command.sh"
        # Some test plugins set COLUMNS, which would go before the size of the terminal.
        script.write_text(
            f"unset COLUMNS LINES; cd '{ROOT}'\n"
            f"'{sys.executable}' -c '{WATCH}' '{run_dir}'\n"
            f"echo $? > '{self._code}'\nsleep 60\n"
        )
        self.tmux("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "30", f"sh '{script}'")

    def tmux(self, *arguments: str) -> str:
        """What tmux answers."""
        done = subprocess.run(["tmux", "-L", self._socket, *arguments], capture_output=True, text=True, check=True)
        return done.stdout

    def wait_for(self, text: str) -> str:
        """The screen, as soon as it holds the text."""
        for _ in range(300):
            screen = self.tmux("capture-pane", "-p")
            if text in screen:
                return screen
            time.sleep(0.1)
        raise AssertionError(f"{text!r} never came; the screen was\n{screen}")

    def exit_code(self) -> int:
        """Of the command, once it has ended."""
        for _ in range(200):
            if self._code.exists() and self._code.read_text().strip():
                return int(self._code.read_text())
            time.sleep(0.1)
        raise AssertionError("the dashboard did not end:\n" + self.tmux("capture-pane", "-p"))


@pytest.fixture
def terminal(tmp_path):
    opened = Terminal(tmp_path)
    yield opened
    opened.tmux("kill-server")


class Writer(threading.Thread):
    """A run that writes a step every twentieth of a second until it is told to stop."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._stop_now = threading.Event()
        self.steps = 0

    def run(self) -> None:
        with self._path.open("a", buffering=1) as file:
            file.write(json.dumps({**run_event(make_plan(), 9999), "time": time.time()}) + "\n")
            while not self._stop_now.wait(0.05):
                self.steps += 1
                file.write(json.dumps({**step_event(self.steps, 0.0), "time": time.time()}) + "\n")

    def stop(self) -> None:
        self._stop_now.set()
        self.join()


def test_a_growing_run_is_shown_and_q_leaves_it_growing(terminal, tmp_path):
    writer = Writer(tmp_path / "events.jsonl")
    writer.start()
    try:
        screen = terminal.wait_for("of 9,999")
        assert "gpt.py" in screen
        screen = terminal.wait_for(" now ")  # any loss: a slow machine may not come to see the first ones
        assert re.search(r" now \d\.\d", screen)
        assert "loss" in screen and any("⠁" <= character <= "⣿" for character in screen)
        terminal.tmux("send-keys", "q")
        assert terminal.exit_code() == 0
        before = writer.steps
        time.sleep(0.5)
        assert writer.is_alive() and writer.steps > before
    finally:
        writer.stop()


def test_ctrl_c_ends_the_dashboard_with_130(terminal, tmp_path):
    with (tmp_path / "events.jsonl").open("w") as file:
        file.writelines(json.dumps(event) + "\n" for event in make_events(done=5))
    terminal.wait_for("step 5 of 400")
    terminal.tmux("send-keys", "C-c")
    assert terminal.exit_code() == 130


def test_an_interrupt_from_elsewhere_ends_the_dashboard_with_130(terminal, tmp_path):
    (tmp_path / "events.jsonl").touch()
    terminal.wait_for("waiting for the run to start")
    [shell] = terminal.tmux("list-panes", "-F", "#{pane_pid}").split()
    [dashboard] = psutil.Process(int(shell)).children()
    dashboard.send_signal(signal.SIGINT)
    assert terminal.exit_code() == 130


def test_a_resized_terminal_is_drawn_anew(terminal, tmp_path):
    with (tmp_path / "events.jsonl").open("w") as file:
        file.writelines(json.dumps(event) + "\n" for event in make_events(done=5, end="finished"))
    terminal.wait_for("finished at step 5")
    terminal.tmux("resize-window", "-x", "140", "-y", "40")
    terminal.wait_for("above parameters, below optimizer state")
    terminal.tmux("send-keys", "q")
    assert terminal.exit_code() == 0

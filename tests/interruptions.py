"""Ctrl-C at any line of the runtime's code, counted."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import offload

FOLDER = str(Path(offload.__file__).parent)


def interrupted(work: Callable[[], Any], line: int) -> str | None:
    """Do the work and raise KeyboardInterrupt where it comes to this many lines of ``offload``.

    Gives that place; None where there are fewer lines.
    """
    place: str | None = None
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal place, lines
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event == "line":
            lines += 1
            if lines == line:
                place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        assert place is not None
    finally:
        sys.settrace(before)
    return place

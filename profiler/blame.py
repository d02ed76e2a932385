"""Turns what a person's code raises into one sentence and the lines of that code."""

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from profiler.errors import ProfilerError, SourceError
from profiler.hints import hint

_OURS = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), _OURS, _TORCH, "<")


@contextmanager
def explained(what: str, path: Path | None = None) -> Iterator[None]:
    """Raise SourceError("{what}: {the error}") for any error inside; ours, which say enough, pass.

    ``path`` is the person's file: lines of it, and of files in its folder, make the traceback. Without it, the
    lines outside of installed libraries do.
    """
    try:
        yield
    except ProfilerError:
        raise
    except (Exception, SystemExit) as error:
        raise SourceError(f"{what}: {_sentence(error)}", user_traceback(error, path)) from error


def user_traceback(error: BaseException, path: Path | None) -> str:
    """The traceback's lines that are the person's own, or at least its last one outside of torch."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if _is_own(f.filename, path)]
    if not own:
        own = [f for f in frames if not f.filename.startswith((_OURS, _TORCH, "<"))][-1:]
    return "".join(traceback.format_list(own) + traceback.format_exception_only(error)).rstrip()


def _is_own(filename: str, path: Path | None) -> bool:
    if path is None:
        return not filename.startswith(_LIBRARIES)
    inside = filename.startswith(str(path.parent) + "/") and "site-packages" not in filename
    return filename == str(path) or (inside and not filename.startswith((_OURS, _TORCH)))


def _sentence(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it exits ({error.code!r}); keep what parses arguments or trains under if __name__ == '__main__'"
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    said = f"{type(error).__name__}: {first}" if first else type(error).__name__
    advice = hint(error)
    return f"{said}; {advice}" if advice else said

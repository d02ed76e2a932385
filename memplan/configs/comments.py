"""Sentences as comments: what a target can not express is said in its own file."""

from collections.abc import Iterable
from textwrap import wrap

WIDTH = 100


def commented(sentences: Iterable[str]) -> str:
    """Lines of a comment, as YAML, Python and shell write it, each sentence on a line of its own."""
    lines = (wrap(s, WIDTH - 2, subsequent_indent="  ", break_on_hyphens=False) for s in sentences)
    return "".join(f"# {line}\n" for wrapped in lines for line in wrapped)

"""Sentences as comments: what a target can not express is said in its own file."""

from collections.abc import Iterable
from textwrap import wrap

WIDTH = 100


def commented(sentences: Iterable[str]) -> str:
    """Lines of a comment, as YAML, Python and shell write it, each sentence on a line of its own."""
    return "".join(
        f"# {line}\n" for sentence in sentences for line in wrap(sentence, WIDTH - 2, subsequent_indent="  ")
    )

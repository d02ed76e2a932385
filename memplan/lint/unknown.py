"""Keys that DeepSpeed does not know, and what was probably meant."""

import re
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from functools import lru_cache

from memplan.lint.document import Document, KeyPath
from memplan.lint.finding import Finding, Severity
from memplan.lint.schema import ANY_KEY, Section, schema

NEAR = 0.72
"""Of a SequenceMatcher ratio, from which on a key is taken for a misspelt other one."""
ELSEWHERE = 0.9
"""How much a key of another section counts beside one of the same section."""
PART = 0.85
"""The likeness of a name whose words are all in another one, like micro_batch_size."""
SHORT, ONE_SLIP = 3, 0.75
"""Letters of names of which one slip leaves too little for a ratio, and the likeness that it then has."""
SPELLINGS = ((r"isation", "ization"), (r"ise(r|d|s)?\b", r"ize\1"), (r"isi", "izi"), (r"our", "or"), (r"tre\b", "ter"))


def unknown_keys(document: Document) -> Iterator[Finding]:
    """Every key that no section has, section by section."""
    for path, found in document.sections():
        section = schema().section(path)
        if section is None or ANY_KEY in section.keys:
            continue
        for name in found:
            if name not in section.keys:
                yield _finding(document, section, (*path, name))


def duplicate_keys(document: Document) -> Iterator[Finding]:
    """Keys that are written twice, which DeepSpeed refuses."""
    for twice in document.duplicates:
        yield Finding(
            "error",
            ".".join(twice.path),
            twice.line,
            f"written twice, first in line {twice.first_line}; DeepSpeed refuses the file, Hugging Face takes the last",
            "remove one of them",
        )


def _finding(document: Document, section: Section, path: KeyPath) -> Finding:
    where = ".".join(section.path) or "the file"
    # What starts with an underscore is a person's own remark.
    meant = None if path[-1].startswith("_") else nearest(path[-1], section)
    ignored = f"unknown in {where}; DeepSpeed ignores it and says nothing"
    severity: Severity = "error"
    if section.checked:
        message = f"unknown in {where}; DeepSpeed stops at start"
    elif meant is None:
        severity, message = "warning", ignored
    else:
        message = ignored + _instead(document, meant)
    return Finding(severity, ".".join(path), document.line(path), message, _suggestion(path[-1], meant, section))


def _instead(document: Document, meant: KeyPath) -> str:
    """What happens where the key that was meant is missing."""
    if document.get(*meant) is not None:
        return ""
    if meant == ("zero_optimization",):
        return ": ZeRO stage 0 runs"
    home = schema().section(meant[:-1])
    key = home.keys[meant[-1]] if home is not None else None
    if key is None or not key.types or "section" in key.types or key.default is None:
        return ""
    return f": {meant[-1]} stays {str(key.default).lower() if isinstance(key.default, bool) else key.default}"


def _suggestion(name: str, meant: KeyPath | None, section: Section) -> str | None:
    if meant is None:
        return None
    if meant[:-1] == section.path:
        return meant[-1]
    home = ".".join(meant[:-1]) or "the top level"
    return f"{name} belongs into {home}" if meant[-1] == name else f"{meant[-1]}, in {home}"


def nearest(name: str, section: Section) -> KeyPath | None:
    """The path of the key that is most like ``name``; keys of the same section first, ``None`` if none is near."""
    best, best_score = None, NEAR
    for path, key_name in _candidates(section):
        weight = 1.0 if path[:-1] == section.path else ELSEWHERE
        score = weight * likeness(name, key_name, best_score / weight)
        if score > best_score:
            best, best_score = path, score
    return best


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The most similar of some names, if one is near."""
    scored = [(likeness(name, other, NEAR), other) for other in names]
    score, best = max(scored, default=(0.0, ""))
    return best if score > NEAR else None


def likeness(name: str, other: str, enough: float) -> float:
    """From 0 to 1, case, hyphens and British spelling apart; 0 for anything surely below ``enough``."""
    if name == other:
        return 1.0
    plain, against = _plain(name), _plain(other)
    words = set(plain.split("_"))
    if len(words) > 1 and words < set(against.split("_")):
        return max(PART, SequenceMatcher(None, plain, against, autojunk=False).ratio())
    if len(against) <= SHORT and _one_slip(plain, against):
        return ONE_SLIP
    matcher = SequenceMatcher(None, plain, against, autojunk=False)
    if matcher.real_quick_ratio() < enough or matcher.quick_ratio() < enough:
        return 0.0
    # A name that differs in its spelling only is nearer than one with another letter.
    return 0.99 if plain == against else min(matcher.ratio(), 0.98)


def _one_slip(name: str, other: str) -> bool:
    """Whether one letter is another one, or two neighbours are swapped."""
    if len(name) != len(other):
        return False
    off = [i for i, (a, b) in enumerate(zip(name, other, strict=True)) if a != b]
    swapped = len(off) == 2 and off[1] == off[0] + 1 and name[off[0]] + name[off[1]] == other[off[1]] + other[off[0]]
    return len(off) == 1 or swapped


@lru_cache(maxsize=4096)
def _plain(name: str) -> str:
    spelled = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name) if not name.isupper() else name
    spelled = re.sub(r"[\s\-.]+", "_", spelled.lower())
    for british, american in SPELLINGS:
        spelled = re.sub(british, american, spelled)
    return spelled


def _candidates(section: Section) -> Iterator[tuple[KeyPath, str]]:
    """Keys of use, those of the same section first; of second names the first one."""
    others = (s for path, s in schema().sections.items() if path != section.path)
    for home in (section, *others):
        for name, key in home.keys.items():
            if key.status == "ignored" and key.instead is not None:
                yield (*home.path, key.instead), name
            elif name != ANY_KEY and ANY_KEY not in home.path and key.status in (None, "deprecated"):
                yield (*home.path, key.name), name
    if not section.path:
        for name in schema().optimizers["adam"]["all"]:
            yield ("optimizer", "params", name), name

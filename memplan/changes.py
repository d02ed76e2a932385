"""What a better configuration has otherwise than a person's own, key by key, and only what makes a difference."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from json import dumps
from typing import Any

from memplan.configs.carried import PLANNED
from memplan.given_config import MICRO, STEPS, TRAIN, GivenConfig
from memplan.lint.document import Document, parse_document
from memplan.lint.kinds import shown
from memplan.lint.rules import errors_in, lint_document
from memplan.lint.schema import schema
from memplan.lint.view import OLD_NAMES, Facts, View, Z
from memplan.unpriced import PRICED

LEFT_OUT = "left out"
UNWRITTEN = "not written"


@dataclass(frozen=True)
class Change:
    """A key that the better configuration has otherwise."""

    key: str
    theirs: str
    better: str


def changes(given: GivenConfig, better: Mapping[str, Any], gpus: int) -> Iterator[Change]:
    """From a configuration to a better one, on so many GPUs; what both come to all the same is left out."""
    theirs, mine = given.view, View(parse_document(dumps(better)))
    anew = View(_at_stage(given, mine.stage))
    sizes = dict(zip((TRAIN, MICRO, STEPS), given.values.batch_sizes(gpus), strict=True))
    for dotted in _leaves(better):
        if dotted.split(".")[0] not in PLANNED or _idle(dotted, mine) or mine.stage not in _stages(dotted):
            continue
        has, wants = sizes.get(dotted) or effective(theirs, dotted), effective(mine, dotted)
        # A default that follows from the new stage needs no writing.
        comes_by_itself = dotted != f"{Z}.stage" and wants == effective(anew, dotted)
        if has != wants and not comes_by_itself:
            yield Change(dotted, _is(given, dotted, has), _text(wants))
    for key in given.document.root:
        if key not in (*better, *PLANNED):
            yield Change(key, shown(given.document.get(key)), LEFT_OUT)
    for dotted in _leaves(given.document.root):
        if dotted.split(".")[0] == Z and _is_lost(given, mine, dotted):
            yield Change(dotted, _text(given.document.get(*dotted.split("."))), LEFT_OUT)


def troubles(given: GivenConfig, better: Mapping[str, Any], facts: Facts) -> Iterator[str]:
    """What the linter says of the better configuration and not of the person's own: keys of theirs that do not go with
    what is new."""
    before = {finding.path for finding in lint_document(given.filled, facts)}
    for finding in errors_in(parse_document(dumps(better)), facts):
        if finding.path not in before:
            yield f"In the better configuration {finding.path}: {finding.message}."


def unmended(given: GivenConfig, better: Mapping[str, Any], facts: Facts) -> Iterator[Change]:
    """What the linter calls an error in both: a plan decides nothing there, so it is carried over for them to mend."""
    before = {finding.path for finding in errors_in(given.filled, facts)}
    for finding in errors_in(parse_document(dumps(better)), facts):
        if finding.path in before:
            is_now = given.document.get(*finding.path.split("."))
            mend = f"still there, to be mended by you: {finding.suggestion or 'leave it out'}"
            yield Change(finding.path, UNWRITTEN if is_now is None else shown(is_now), mend)


def effective(view: View, dotted: str) -> Any:
    """What a key comes to, where nothing is written its default at this stage."""
    if dotted == f"{Z}.stage":
        return view.stage
    if dotted == f"{Z}.overlap_comm":
        return view.overlap_comm
    section = dotted.removeprefix(f"{Z}.").removesuffix(".device")
    if dotted == f"{Z}.{section}.device":
        return view.device(section)
    return view.value(dotted)


def _at_stage(given: GivenConfig, stage: int) -> Document:
    """What is given, with nothing but the stage changed."""
    root = {**given.filled.root, Z: {**given.filled.section(Z), "stage": stage}}
    return replace(given.filled, root=root)


def _idle(dotted: str, view: View) -> bool:
    """Whether a key is about offloading that does not take place."""
    section = dotted.split(".")[1] if dotted.count(".") == 2 else ""
    offloads = section in ("offload_param", "offload_optimizer")
    return offloads and view.device(section) == "none" and not dotted.endswith(".device")


def _is_lost(given: GivenConfig, mine: View, dotted: str) -> bool:
    """Whether something of the section that is planned was written, had an effect, and is not there any more."""
    *home, name = dotted.split(".")
    section = schema().section(tuple(home))
    key = section.keys.get(name) if section is not None else None
    if key is None:
        return True  # DeepSpeed stops at it
    if mine.written(dotted):
        return False
    if key.status not in (None, "deprecated"):
        return True
    part = next((part for part, old in OLD_NAMES.items() if old == name), None)
    if part is not None:
        return bool(given.view.value(dotted)) and not mine.written(f"{Z}.{part}.device")
    if key.status is not None:
        return False  # an older name of a key that is looked at itself
    # Sizes are what a plan decides; where a stage has no such key it needs none.
    decided = name in PRICED.get(".".join(home), "").split() and name != "device"
    works = given.view.stage in _stages(dotted)
    return works and not decided and given.view.value(dotted) != key.default and not _idle(dotted, given.view)


def _stages(dotted: str) -> Collection[int]:
    """In which a key has an effect."""
    return schema().key(tuple(dotted.split("."))).stages or range(4)


def _is(given: GivenConfig, dotted: str, value: Any) -> str:
    if given.document.get(*dotted.split(".")) == "auto":
        return f'"auto", {_text(value)}'
    # An older form of a key is no default.
    bare = View(Document({} if dotted == f"{Z}.stage" else {Z: {"stage": given.view.stage}}))
    by_default = value is not None and not given.view.written(dotted) and value == effective(bare, dotted)
    return _text(value) + (" (default)" if by_default else "")


def _leaves(config: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name, value in config.items():
        path = f"{above}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}.")
        else:
            yield path


def _text(value: Any) -> str:
    return UNWRITTEN if value is None else f"{value:,}" if isinstance(value, int) and value > 9999 else str(value)

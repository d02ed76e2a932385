"""Keys that DeepSpeed knows: whether it still uses them, and whether it can use their values."""

from collections.abc import Callable, Iterator
from typing import Any

from memplan.lint.document import KeyPath
from memplan.lint.finding import Finding, Severity
from memplan.lint.kinds import KIND_NAMES, KINDS, is_number, is_read, meant_by, shown
from memplan.lint.schema import ANY_KEY, Key, Section, schema
from memplan.lint.unknown import nearest_name
from memplan.lint.view import View


def known_keys(view: View) -> Iterator[Finding]:
    """What is said of each key that the schema has."""
    for path, found in view.document.sections():
        section = schema().section(path)
        if section is None:
            continue
        for name, value in found.items():
            key = section.keys.get(name) or section.keys.get(ANY_KEY)
            if key is not None:
                yield from _key(view, section, key, (*path, name), value)


def filled_by_others(view: View) -> Iterator[Finding]:
    """Every "auto" that Hugging Face's integrations replace, in one note."""
    autos = sorted((view.document.line(path), path) for path in schema().filled if view.document.get(*path) == "auto")
    if not autos:
        return
    line, path = autos[0]
    others = f" and in {len(autos) - 1} other place{'s' * (len(autos) > 2)}" if len(autos) > 1 else ""
    message = (
        f'"auto" here{others} is filled in by Hugging Face\'s Trainer and Accelerate only; without them DeepSpeed '
        "takes its default or stops"
    )
    yield Finding("note", ".".join(path), line, message)


def _key(view: View, section: Section, key: Key, path: KeyPath, value: Any) -> Iterator[Finding]:
    def say(severity: Severity, message: str, suggestion: str | None = None) -> Finding:
        return Finding(severity, ".".join(path), view.document.line(path), message, suggestion)

    if key.status is not None:
        yield from _status(key, value, say)
    if key.types:
        yield from value_findings(key, value, section.checked, path in schema().filled, say)
    stage = view.value("zero_optimization.stage")
    if key.stages and stage not in key.stages and value != key.default and value not in ({}, "auto"):
        has = " and ".join(map(str, key.stages))
        # Sections have rules of their own: whether a device is set decides.
        if "section" not in key.types:
            yield say("note", f"has an effect at ZeRO stage {has} only, and this is stage {stage}")


Say = Callable[..., Finding]


def _status(key: Key, value: Any, say: Say) -> Iterator[Finding]:
    because = f": {key.because}" if key.because else ""
    if key.status == "removed":
        yield say("error", f"DeepSpeed {schema().deepspeed} stops at start{because}", _replacement(key))
    elif key.status == "refused" and value is not None:
        yield say("error", f"DeepSpeed stops at start{because}", _replacement(key))
    elif key.status == "ignored":
        # A value that is what happens anyway misleads nobody.
        harmless = "note" if bool(key.types) and value == key.default else "warning"
        yield say("error" if key.instead else harmless, f"DeepSpeed ignores it{because}", _replacement(key))
    elif key.status == "internal":
        yield say("warning", f"not for configurations{because}", "leave it out")
    elif key.status == "deprecated":
        yield say("warning", "an older spelling, which DeepSpeed will drop", f"use {key.instead}")


def _replacement(key: Key) -> str:
    return f"use {key.instead}" if key.instead else "leave it out"


def value_findings(key: Key, value: Any, checked: bool, filled: bool, say: Say) -> Iterator[Finding]:
    """What is wrong with one value: "auto", its type, its range."""
    if value == "auto" and "auto" not in (*key.values, key.default):
        # What others fill in is told once for all of it, by the rule below.
        if not filled:
            yield _auto(key, checked, say)
        return
    if not any(KINDS[kind](value) for kind in key.types):
        if not (checked and is_read(key.types, value)) or (key.strict and isinstance(value, bool)):
            yield _wrong_type(key, value, checked, say)
            return
        meant = meant_by(key.types, value)
        yield say("warning", f"{shown(value)} is read as {shown(meant)} here, not in every section", _write(meant))
        value = meant
    yield from _choice(key, value, say)
    if is_number(value):
        yield from _range(key, value, say)


def _choice(key: Key, value: Any, say: Say) -> Iterator[Finding]:
    if key.values and value is not None:
        allowed = [v.lower() if key.nocase and isinstance(v, str) else v for v in key.values]
        if (value.lower() if key.nocase and isinstance(value, str) else value) not in allowed:
            near = nearest_name(value, map(str, key.values)) if isinstance(value, str) else None
            listed = ", ".join(map(str, key.values))
            yield say("error", f"{shown(value)} is none of {listed}", near)
    for item in value if key.items and isinstance(value, list) else ():
        if item not in key.items:
            yield say("error", f"{shown(item)} is none of {', '.join(map(str, key.items))}")
    if key.words and isinstance(value, str) and value not in key.words:
        yield say("error", f"{shown(value)} is not a number or {' or '.join(map(shown, key.words))}")
    if key.item_type is not None and isinstance(value, list):
        for item in value:
            if not KINDS[key.item_type](item):
                yield say("error", f"{shown(item)} is not {KIND_NAMES[key.item_type]}; DeepSpeed stops at start")


def _range(key: Key, value: float, say: Say) -> Iterator[Finding]:
    limits = (
        (key.min, lambda limit: value < limit, "at least"),
        (key.above, lambda limit: value <= limit, "more than"),
        (key.max, lambda limit: value > limit, "at most"),
        (key.below, lambda limit: value >= limit, "less than"),
    )
    for limit, broken, words in limits:
        if limit is not None and broken(limit):
            yield say("error", f"{value:g} is out of range: it must be {words} {limit:g}")


def _auto(key: Key, checked: bool, say: Say) -> Finding:
    default = shown(key.default)
    alone = f"the default, {default}, is taken" if checked else "it stays a string, and DeepSpeed stops or goes wrong"
    return say("warning" if checked else "error", f'nobody fills in this "auto": {alone}', f"write {default}")


def _wrong_type(key: Key, value: Any, checked: bool, say: Say) -> Finding:
    wanted = " or ".join(dict.fromkeys(KIND_NAMES[kind] for kind in key.types if kind != "null"))
    if key.name.startswith("offload_") and value in ("cpu", "nvme"):
        return say("error", f"{shown(value)} is not {wanted}; DeepSpeed stops at start", f'{{"device": "{value}"}}')
    meant = meant_by(key.types, value)
    what = f"{shown(value)} is not {wanted}"
    if meant is not None and "bool" in key.types and isinstance(value, str):
        return say("error", f"{what}; DeepSpeed does not look, and takes any string for true", _write(meant))
    stops = "DeepSpeed stops at start" if checked or meant is None else "DeepSpeed does not look, and goes wrong later"
    return say("error", f"{what}; {stops}", None if meant is None else _write(meant))


def _write(value: Any) -> str:
    return f"write {shown(value)}"

"""A configuration file as data that remembers its lines.

DeepSpeed reads Hjson: JSON in which comments, trailing and missing commas, and words without quotes are allowed too.
So does this. Hugging Face's Trainer and Accelerate read the same file as plain JSON, so the first place that is not
plain is kept.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memplan.errors import ConfigError

KeyPath = tuple[str, ...]
"""Keys from the root; elements of a list by their number."""

NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")
LONGEST_NUMBER = 400
SINGLE_QUOTED = re.compile(r"'((?:[^'\\\n]|\\.)*)'")
KEY = re.compile(r"[^,:\[\]{}\s]+")
DECODER = json.JSONDecoder()
WORDS = {"true": True, "false": False, "null": None}
OTHER_FILES = re.compile(r"^(compute_environment|distributed_type|deepspeed_config|deepspeed_config_file)\s*:", re.M)


@dataclass(frozen=True)
class Duplicate:
    """A key that is written twice in one section."""

    path: KeyPath
    line: int
    first_line: int


@dataclass(frozen=True)
class Document:
    """A parsed file. Of keys written twice, the last one counts."""

    root: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    """The line of every key and list element, from 1."""
    duplicates: tuple[Duplicate, ...] = ()
    not_plain: tuple[int, str] | None = None
    """Line and kind of the first thing that plain JSON does not have."""

    def line(self, path: KeyPath) -> int:
        """Of the key, or of the nearest one above it that is written."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def get(self, *path: str) -> Any:
        """The value under keys; ``None`` where one is missing or is no section."""
        value: Any = self.root
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def section(self, *path: str) -> dict[str, Any]:
        """The section under keys; an empty one where there is none."""
        value = self.get(*path)
        return value if isinstance(value, dict) else {}

    def sections(self, path: KeyPath = ()) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
        """Every section of the file, from the root down."""
        section = self.section(*path)
        yield path, section
        for key, value in section.items():
            if isinstance(value, dict):
                yield from self.sections((*path, key))


def read_document(path: Path) -> Document:
    """Parse a configuration file.

    Raises ConfigError, with line and column, for what DeepSpeed could not read, and for files that hold no
    configuration of DeepSpeed; OSError where there is no such file.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8; a configuration of DeepSpeed is a JSON file") from error
    start = text.lstrip()
    if not start:
        raise ConfigError(f"{path} is empty; a configuration of DeepSpeed is a JSON object, like {{}}")
    if OTHER_FILES.search(text) and not start.startswith("{"):
        raise ConfigError(
            f"{path} is a configuration of Accelerate, not of DeepSpeed; "
            "lint the JSON file that its deepspeed_config_file names"
        )
    if path.suffix in (".yaml", ".yml") and not start.startswith("{"):
        raise ConfigError(f"{path} is a YAML file; a configuration of DeepSpeed is a JSON object")
    try:
        return parse_document(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_document(text: str) -> Document:
    """The document of a text; raises ConfigError with line and column."""
    parser = _Parser(text)
    try:
        return parser.document()
    except RecursionError:
        raise parser.error("there are too many brackets in each other") from None


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.line_starts = [0, *(m.end() for m in re.finditer("\n", text))]
        self.lines: dict[KeyPath, int] = {}
        self.duplicates: list[Duplicate] = []
        self.not_plain: tuple[int, str] | None = None
        self.greedy = ""

    def document(self) -> Document:
        self._skip()
        if self._here() != "{":
            what = {"[": "a list", '"': "a string"}.get(self._here(), "something else")
            raise self.error(f"this is {what}; a configuration of DeepSpeed is a JSON object in braces")
        root = self._object(())
        self._skip()
        if self.at < len(self.text):
            raise self.error("there is more text after the closing brace")
        return Document(root, self.lines, tuple(self.duplicates), self.not_plain)

    def _line(self, at: int | None = None) -> int:
        return bisect_right(self.line_starts, self.at if at is None else at)

    def error(self, what: str, at: int | None = None) -> ConfigError:
        """A sentence with line and column."""
        at = self.at if at is None else at
        line = self._line(at)
        return ConfigError(f"line {line}, column {at - self.line_starts[line - 1] + 1}: {what}")

    def _odd(self, what: str) -> None:
        if self.not_plain is None:
            self.not_plain = self._line(), what

    def _here(self) -> str:
        return self.text[self.at : self.at + 1]

    def _skip(self) -> None:
        """Past blanks and comments."""
        while self.at < len(self.text):
            if self.text[self.at].isspace():
                self.at += 1
            elif self.text[self.at] == "#" or self.text.startswith("//", self.at):
                self._odd("a comment")
                self.at = self._end_of_line()
            elif self.text.startswith("/*", self.at):
                self._odd("a comment")
                end = self.text.find("*/", self.at + 2)
                if end < 0:
                    raise self.error("this comment does not end")
                self.at = end + 2
            else:
                return

    def _end_of_line(self) -> int:
        end = self.text.find("\n", self.at)
        return len(self.text) if end < 0 else end

    def _object(self, path: KeyPath) -> dict[str, Any]:
        opened = self.at
        self.at += 1
        found: dict[str, Any] = {}
        self._skip()
        while self._here() != "}":
            if not self._here():
                raise self.error(f"this brace is never closed{self.greedy}", opened)
            line = self._line()
            key = self._key()
            self._skip()
            if self._here() != ":":
                raise self.error(f"a colon is missing after the key {key}")
            self.at += 1
            self._skip()
            here = (*path, key)
            if key in found:
                self.duplicates.append(Duplicate(here, line, self.lines[here]))
                # The values of the first one are lost, so their lines are too.
                self.lines = {p: n for p, n in self.lines.items() if p[: len(here)] != here}
            self.lines[here] = line
            found[key] = self._value(here)
            self._separator("}")
        self.at += 1
        return found

    def _array(self, path: KeyPath) -> list[Any]:
        opened = self.at
        self.at += 1
        found: list[Any] = []
        self._skip()
        while self._here() != "]":
            if not self._here():
                raise self.error(f"this bracket is never closed{self.greedy}", opened)
            here = (*path, str(len(found)))
            self.lines[here] = self._line()
            found.append(self._value(here))
            self._separator("]")
        self.at += 1
        return found

    def _separator(self, closing: str) -> None:
        self._skip()
        if self._here() == ",":
            self.at += 1
            self._skip()
            if self._here() == closing:
                self._odd("a comma before a closing bracket")
        elif self._here() not in ("", closing):
            self._odd("a missing comma")

    def _key(self) -> str:
        if self._here() in ('"', "'"):
            return self._string()
        self._odd("a key without quotes")
        match = KEY.match(self.text, self.at)
        if match is None:
            raise self.error("a key is missing here")
        self.at = match.end()
        return match.group()

    def _value(self, path: KeyPath) -> Any:
        here = self._here()
        if here == "{":
            return self._object(path)
        if here == "[":
            return self._array(path)
        if here in ('"', "'"):
            return self._string()
        if here in ("", "}", "]", ",", ":"):
            raise self.error("a value is missing here")
        return self._bare()

    def _string(self) -> str:
        start, quote = self.at, self._here()
        if quote == "'":
            self._odd("a string in single quotes")
            if self.text.startswith("'''", start):
                return self._text_block()
            match = SINGLE_QUOTED.match(self.text, start)
            if match is None:
                raise self.error("this string does not end", start)
            inner = match[1].replace("\\'", "'").replace('"', '\\"')
            try:
                value = json.loads(f'"{inner}"')
            except json.JSONDecodeError as error:
                raise self.error(f"{error.msg.lower()} in this string", start) from None
            self.at = match.end()
            return value
        try:
            value, self.at = DECODER.raw_decode(self.text, start)
        except json.JSONDecodeError as error:
            unfinished = error.msg.startswith("Unterminated") or self.text[error.pos : error.pos + 1] == "\n"
            what = "this string does not end" if unfinished else f"{error.msg.lower()}"
            raise self.error(what, start if unfinished else error.pos) from None
        return value

    def _text_block(self) -> str:
        """Text between triple quotes, without the indentation of its first line."""
        indent = self.at - self.line_starts[self._line() - 1]
        end = self.text.find("'''", self.at + 3)
        if end < 0:
            raise self.error("this string does not end")
        body = self.text[self.at + 3 : end]
        self.at = end + 3
        first, *rest = body.split("\n")
        lines = ([first] if first.strip() else []) + [
            line[min(indent, len(line) - len(line.lstrip())) :] for line in rest
        ]
        return "\n".join(lines).removesuffix("\n")

    def _bare(self) -> Any:
        """A number or a word; anything else is text up to the end of the line."""
        rest = self.text[self.at : self._end_of_line()]
        for match in re.finditer(r"[,}\]#]|//|/\*|$", rest):
            chunk = rest[: match.start()].strip()
            if chunk in WORDS:
                self.at += match.start()
                return WORDS[chunk]
            number = NUMBER.fullmatch(chunk)
            if number is not None:
                if len(chunk) > LONGEST_NUMBER:
                    raise self.error("this number is too long")
                self.at += match.start()
                return float(chunk) if number[1] or number[2] else int(chunk)
        self._odd("a value without quotes")
        if {"}", "]"} & set(rest):
            self.greedy = f"; the value {rest.strip()} in line {self._line()} has no quotes, so it takes the whole line"
        self.at += len(rest)
        return rest.strip()

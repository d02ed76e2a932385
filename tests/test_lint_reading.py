"""Configuration files are read as DeepSpeed reads them, and every line is known."""

import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.errors import ConfigError
from memplan.lint.document import parse_document, read_document

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)
OBJECTS = st.dictionaries(st.text(), VALUES)

HJSON = [
    "{a: 1}",
    '{"a": True\n}',
    '{"a": True, "b": 2\n}',
    "{a: 5e8 # elements\n b: [1 2\n 3,]}",
    '{"a": \'x"y\'}',
    "{a: 'it\\'s'}",
    "{a: hello // no comment\n}",
    "{a: 1 // a comment\n}",
    "{a: '''\n  x\n   y\n  '''\n}",
    "{a: 0x1\n}",
    "{a: 01\n}",
    "{a: -1.5E+3}",
    "{/*x*/ a: null}",
    "{a: nullx\n}",
    "{a: NaN\n}",
    '{"a": 1 2\n}',
    "{a: {b: [true, false], },\n}",
]


@given(OBJECTS)
def test_plain_json_is_read_as_json_reads_it(value):
    for indent in (None, 2):
        text = json.dumps(value, indent=indent)
        document = parse_document(text)
        assert document.root == json.loads(text)
        assert document.not_plain is None
        assert document.duplicates == ()


@given(OBJECTS)
def test_every_key_has_the_line_that_it_stands_in(value):
    lines = json.dumps(value, indent=2).splitlines()
    document = parse_document("\n".join(lines))
    for path, line in document.lines.items():
        if not path[-1].isdecimal():
            assert lines[line - 1].strip().startswith(json.dumps(path[-1]))


@pytest.mark.parametrize("text", HJSON)
def test_hjson_is_read_as_hjson_reads_it(text):
    hjson = pytest.importorskip("hjson")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = json.loads(json.dumps(hjson.loads(text)))
    document = parse_document(text)
    assert document.root == expected
    assert document.not_plain is not None


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ('{\n  "a": 1,\n  "b" 2\n}', "line 3, column 7", "a colon is missing after the key b"),
        ('{"a": {"b": 1}', "line 1, column 1", "this brace is never closed"),
        ('{"a": True}', "line 1, column 1", "the value True} in line 1 has no quotes"),
        ('{"a": [1,\n', "line 1, column 7", "this bracket is never closed"),
        ('{"a": "x\n}', "line 1, column 7", "this string does not end"),
        ('{"a": "\\q"}', "line 1, column 8", "invalid \\escape"),
        ('{"a": }', "line 1, column 7", "a value is missing"),
        ('{"a": 1,, "b": 2}', "line 1, column 9", "a key is missing"),
        ("{/* a", "line 1, column 2", "this comment does not end"),
        ('{"a": 1} x', "line 1, column 10", "more text after the closing brace"),
        ("[1]", "line 1, column 1", "this is a list"),
        ('"a"', "line 1, column 1", "this is a string"),
        ('{"a": ' + "[" * 50_000, "line 1, column", "too many brackets"),
        ('{"a": ' + "9" * 5000 + "}", "line 1, column 7", "too long"),
        ("3", "line 1, column 1", "this is something else"),
    ],
)
def test_what_can_not_be_read_is_said_with_line_and_column(text, where, what):
    with pytest.raises(ConfigError) as error:
        parse_document(text)
    assert where in str(error.value)
    assert what in str(error.value)


@given(st.text())
def test_any_text_is_a_document_or_a_sentence(text):
    try:
        parse_document("{" + text)
    except ConfigError as error:
        assert str(error).startswith("line ")


def test_duplicates_are_kept_with_both_lines():
    document = parse_document('{\n"a": {"b": 1},\n"a": {\n"c": 1,\n"c": 2}}')
    assert [(d.path, d.line, d.first_line) for d in document.duplicates] == [(("a",), 3, 2), (("a", "c"), 5, 4)]
    assert document.root == {"a": {"c": 2}}
    assert ("a", "b") not in document.lines


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("x.yaml", "compute_environment: LOCAL_MACHINE\ndeepspeed_config: {}\n", "configuration of Accelerate"),
        ("x.json", "distributed_type: DEEPSPEED\n", "configuration of Accelerate"),
        ("x.yml", "a: 1\n", "a YAML file"),
        ("x.json", " \n", "is empty"),
        ("x.json", b"\xff\xfe{", "not text in UTF-8"),
    ],
)
def test_files_of_other_kinds_get_a_sentence(tmp_path, name, text, sentence):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=sentence):
        read_document(path)

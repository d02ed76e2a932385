"""Two hundred misspelt keys, generated over every level of the configuration."""

import random
from json import dumps

import pytest

from memplan.lint import lint_document
from memplan.lint.document import parse_document
from memplan.lint.schema import ANY_KEY, schema
from memplan.lint.unknown import likeness, nearest

COUNT = 200
RIGHT_SHARE = 0.95


def deleted(name, rng):
    at = rng.randrange(len(name))
    return name[:at] + name[at + 1 :]


def swapped(name, rng):
    at = rng.randrange(len(name) - 1)
    return name[:at] + name[at + 1] + name[at] + name[at + 2 :]


def doubled(name, rng):
    at = rng.randrange(len(name))
    return name[:at] + name[at] + name[at:]


def replaced(name, rng):
    at = rng.randrange(len(name))
    return name[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz") + name[at + 1 :]


def capital(name, _):
    return name.title()


def camel(name, _):
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


def hyphens(name, _):
    return name.replace("_", "-")


def closed(name, _):
    return name.replace("_", "")


def british(name, _):
    return name.replace("optimiz", "optimis").replace("quantiz", "quantis").replace("synchroniz", "synchronis")


MISTAKES = (deleted, swapped, doubled, replaced, capital, camel, hyphens, closed, british)


def typos():
    """``COUNT`` (section, right key, wrong key), every section in turn, every kind of mistake in turn."""
    rng = random.Random(4)
    sections = [s for s in schema().sections.values() if ANY_KEY not in (*s.path, *s.keys)]
    found = []
    for turn in range(100_000):
        section = sections[turn % len(sections)]
        names = [name for name, key in section.keys.items() if key.status is None and len(name) > 3]
        if not names:
            continue
        name = rng.choice(names)
        wrong = MISTAKES[rng.randrange(len(MISTAKES))](name, rng)
        if wrong not in section.keys and (section.path, wrong) not in {(s.path, w) for s, _, w in found}:
            found.append((section, name, wrong))
        if len(found) == COUNT:
            return found
    raise AssertionError("too few typos")


def nested(path, key):
    value = {key: None}
    for name in reversed(path):
        value = {name: value}
    return value


def test_two_hundred_typos_are_all_found_and_nearly_all_understood():
    import json

    right = []
    for section, name, wrong in typos():
        document = parse_document(json.dumps(nested(section.path, wrong), indent=1))
        dotted = ".".join((*section.path, wrong))
        findings = [f for f in lint_document(document) if f.path == dotted and "unknown" in f.message]
        assert len(findings) == 1, dotted
        assert findings[0].line == len(section.path) + 2
        assert findings[0].severity in ("error", "warning")
        meant = section.keys[name].name
        right.append(findings[0].suggestion is not None and findings[0].suggestion in (meant, name))
    assert sum(right) >= RIGHT_SHARE * COUNT, sum(right)


def test_a_misspelt_section_says_what_runs_instead():
    (finding,) = (f for f in lint_document(parse_document('{"zero_optimisation": {"stage": 3}}')) if "zero" in f.path)
    assert finding.severity == "error"
    assert "ignores it" in finding.message
    assert "ZeRO stage 0 runs" in finding.message
    assert finding.suggestion == "zero_optimization"


@pytest.mark.parametrize(
    ("text", "key", "suggestion"),
    [
        ('{"overlap_comm": true}', "overlap_comm", "overlap_comm belongs into zero_optimization"),
        ('{"nvme_path": "/x"}', "nvme_path", "nvme_path belongs into zero_optimization.offload_param"),
        ('{"lr": 1}', "lr", "lr belongs into optimizer.params"),
        ('{"micro_batch_size": 1}', "micro_batch_size", "train_micro_batch_size_per_gpu"),
        ('{"aio": {"thread_counts": 4}}', "aio.thread_counts", "intra_op_parallelism"),
        (
            '{"zero_optimization": {"train_batch_size": 4}}',
            "zero_optimization.train_batch_size",
            "train_batch_size belongs into the top level",
        ),
        (
            '{"activation_checkpointing": {"partitioned_activations": true}}',
            "activation_checkpointing.partitioned_activations",
            "partition_activations",
        ),
    ],
)
def test_a_key_of_another_section_is_sent_there(text, key, suggestion):
    (finding,) = (f for f in lint_document(parse_document(text)) if f.path == key)
    assert finding.suggestion == suggestion


@pytest.mark.parametrize("name", ["_comment", "qqq", "xyzzy_plugh"])
def test_what_is_like_nothing_gets_a_warning_without_a_guess(name):
    (finding,) = (f for f in lint_document(parse_document(f'{{"{name}": 1}}')) if f.path == name)
    assert (finding.severity, finding.suggestion) == ("warning", None)


def test_the_right_spelling_is_nearest_to_itself():
    for section in schema().sections.values():
        for name, key in section.keys.items():
            if name != ANY_KEY and key.status is None and ANY_KEY not in section.path:
                assert nearest(name, section) == (*section.path, key.name)
                assert likeness(name, name, 0) == 1


@pytest.mark.parametrize(
    ("section", "name", "meant"),
    [
        (("optimizer", "params"), "lt", "lr"),
        (("optimizer", "params"), "rl", "lr"),
        (("optimizer", "params"), "kr", "lr"),
        (("optimizer", "params"), "rps", "eps"),
        (("optimizer", "params"), "pes", "eps"),
        ((), "aoi", "aio"),
        ((), "iao", "aio"),
    ],
)
def test_one_slip_in_a_short_name_is_seen(section, name, meant):
    root = {"train_batch_size": 8, "bf16": {"enabled": True}}
    at = {"type": "AdamW", "params": {name: 1e-3}} if section else {"block_size": 1 << 20}
    root["optimizer" if section else name] = at
    (found,) = [f for f in lint_document(parse_document(dumps(root))) if f.path == ".".join((*section, name))]
    assert found.suggestion == meant


def test_a_device_in_place_of_its_section_is_written_as_one():
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}
    found = [f for f in lint_document(parse_document(dumps(config))) if f.path == "zero_optimization.offload_optimizer"]
    assert '{"device": "cpu"}' in [f.suggestion for f in found]


def test_torch_adam_beside_an_offloaded_optimizer_is_itself_the_fault():
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    }
    paths = [f.path for f in lint_document(parse_document(dumps(config))) if f.severity == "warning"]
    assert "optimizer.params.torch_adam" in paths
    assert "optimizer.type" not in paths

"""Each rule has a configuration that it finds fault with, and one beside it that it leaves alone.

Where DeepSpeed's own configuration class is what stops, it is asked too: it must refuse the one and take the other.
"""

import json
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.lint import Facts, lint_document
from memplan.lint.document import parse_document
from tests.lint_cases import ALL, EIGHT, GIB


def whole(config):
    return (
        config
        if "train_micro_batch_size_per_gpu" in config or "train_batch_size" in config
        else {"train_micro_batch_size_per_gpu": 1} | config
    )


def findings(config, facts=None):
    return lint_document(parse_document(json.dumps(whole(config), indent=1)), facts)


def hits(case, config):
    return [
        f
        for f in findings(config, case.facts)
        if (f.path, f.severity) == (case.path, case.severity) and case.words in f.message
    ]


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.path}-{case.words}")
def test_a_rule_finds_its_trouble_and_nothing_else(case):
    (found,) = hits(case, case.bad)
    lines = json.dumps(whole(case.bad), indent=1).splitlines()
    written = case.path.split(".")[-1]
    # What is missing is reported at the section that it is missing from.
    assert f'"{written}"' in lines[found.line - 1] or f'"{written}"' not in "".join(lines)
    assert hits(case, case.good) == []


@pytest.mark.parametrize("case", [c for c in ALL if c.refused], ids=lambda case: f"{case.path}-{case.words}")
def test_deepspeed_refuses_what_is_said_to_stop_at_start(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed = pytest.importorskip("deepspeed")
        with pytest.raises(Exception):  # noqa: B017 - assertions, type errors, and errors of pydantic and its own
            deepspeed.DeepSpeedConfig(json.loads(json.dumps(whole(case.bad))))


@pytest.mark.parametrize(
    "case",
    [c for c in ALL if not c.refused and c.facts.gpus in (None, 1)],
    ids=lambda case: f"{case.path}-{case.words}",
)
def test_deepspeeds_configuration_class_takes_what_only_its_engine_stops_at(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed = pytest.importorskip("deepspeed")
        if any(
            words in case.words
            for words in ("nobody fills", "Trainer", "on any number", "data-parallel ranks", "GPUDirect")
        ):
            pytest.skip("depends on who reads the file, on how many ranks, on which machine")
        deepspeed.DeepSpeedConfig(json.loads(json.dumps(whole(case.bad))))


def test_a_sound_configuration_has_no_findings():
    config = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 10000, "warmup_num_steps": 100}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8, "offload_param": {"device": "cpu"}},
    }
    assert findings(config, EIGHT) == ()


def test_a_file_with_elasticity_is_told_of_that_and_not_of_the_batch_sizes_that_it_once_chose():
    config = {"elasticity": {"enabled": True, "max_train_batch_size": 2000, "micro_batch_sizes": [2, 4, 6]}}
    (found,) = lint_document(parse_document(json.dumps(config)))
    assert (found.path, found.severity) == ("elasticity", "error")
    assert "train_micro_batch_size_per_gpu" in found.suggestion


def test_duplicate_keys_are_refused_with_both_lines():
    (found,) = (f for f in lint_document(parse_document('{\n"fp16": {},\n"fp16": {}}')) if f.path == "fp16")
    assert (found.severity, found.line) == ("error", 3)
    assert "first in line 2" in found.message


def test_what_is_not_plain_json_is_a_note_for_hugging_face():
    (found,) = (f for f in lint_document(parse_document('{"train_batch_size": 8} // mine')) if f.path == "")
    assert found.severity == "note"
    assert "a comment is not JSON" in found.message


KEYS = st.sampled_from(
    ["zero_optimization", "stage", "fp16", "enabled", "optimizer", "type", "params", "offload_param", "device", "aio",
     "nvme_path", "buffer_count", "scheduler", "bf16", "train_batch_size", "zenflow", "data_efficiency", "lr", "qqq"]
)  # fmt: skip
VALUES_ = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["auto", "cpu", "nvme", "", "Adam", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=30,
)


@settings(max_examples=50)
@given(
    st.dictionaries(KEYS, VALUES_),
    st.none() | st.integers(1, 64),
    st.none() | st.lists(st.integers(1, 10**9), min_size=1, max_size=5),
)
def test_any_configuration_is_read_to_its_end(config, gpus, sizes):
    facts = Facts(gpus=gpus, parameter_elements=tuple(sizes) if sizes else None, memlock_bytes=1 << 20, host_bytes=GIB)
    for found in lint_document(parse_document(json.dumps(config)), facts):
        assert found.line == 1
        assert found.message

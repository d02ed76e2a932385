"""``memplan plan --from``: "auto" is counted as what Hugging Face fills in, and that is said."""

from dataclasses import replace
from pathlib import Path

import pytest

from memplan.errors import PlanningError
from memplan.from_config import Verdict, judge
from memplan.given_config import GivenConfig, hidden_size
from offload.plan import Precision
from profiler.profile import ModelProfile
from tests.synthetic_profiles import RATES
from tests.test_from_config import AMPLE, BATCHES, MODEL, printed, read

Z = "zero_optimization"
HIDDEN = 2000
SIZES = {"reduce_bucket_size": 4_000_000, "stage3_prefetch_bucket_size": 3_600_000}
SIZES |= {"stage3_param_persistence_threshold": 20_000}
ALL_AUTO = {
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    Z: {"stage": 3, **dict.fromkeys(SIZES, "auto")},
    "gradient_clipping": "auto",
    **dict.fromkeys(BATCHES, "auto"),
}


def with_embedding(profile: ModelProfile) -> ModelProfile:
    """The profile with an embedding whose width is the hidden size."""
    parameters = (
        replace(p, shape=(p.elements // HIDDEN, HIDDEN)) if p.name == "embed.weight" else p for p in profile.parameters
    )
    layers = (replace(x, type="Embedding") if x.path == "embed" else x for x in profile.layers)
    return replace(profile, parameters=tuple(parameters), layers=tuple(layers))


def trained(
    config: dict,
    folder: Path,
    batch: int | None = None,
    precision: Precision | None = None,
    profiled: Precision | None = None,
) -> GivenConfig:
    return read(config, folder).for_training(2, batch, precision, profiled)


def judged_auto(config: dict, folder: Path, **wishes) -> Verdict:
    return judge(with_embedding(MODEL), AMPLE, RATES, trained(config, folder, **wishes))


def test_the_hidden_size_is_the_width_of_the_first_embedding():
    assert hidden_size(with_embedding(MODEL)) == HIDDEN
    assert hidden_size(MODEL) is None


def test_a_file_with_auto_everywhere_is_priced_for_a_batch(tmp_path):
    verdict = judged_auto(ALL_AUTO, tmp_path, batch=8)
    theirs = verdict.theirs
    assert (theirs.micro_batch_size, theirs.gradient_accumulation_steps) == (4, 1)
    assert theirs.precision is Precision.BF16
    assert (theirs.buckets.reduce_elements, theirs.buckets.gather_elements) == (4_000_000, 3_600_000)
    assert theirs.buckets.persistence_elements == 20_000
    assert any(
        remark.startswith('"auto" is counted as Hugging Face fills it in: bf16.enabled true, train_batch_size 8, ')
        and "zero_optimization.reduce_bucket_size 4,000,000" in remark
        for remark in verdict.remarks
    )


def test_without_a_batch_that_file_asks_for_one(tmp_path):
    with pytest.raises(PlanningError, match="say by --batch-size how many samples"):
        trained(ALL_AUTO, tmp_path)


def test_accumulation_follows_from_the_batch_and_a_written_micro_batch(tmp_path):
    given = trained({**ALL_AUTO, "train_micro_batch_size_per_gpu": 2}, tmp_path, batch=16)
    assert given.values.batch_sizes(2) == (16, 2, 4)
    given = trained({**ALL_AUTO, "train_micro_batch_size_per_gpu": 2}, tmp_path)
    assert given.values.batch_sizes(2) == (4, 2, 1)
    with pytest.raises(PlanningError, match="--batch-size is in the configuration already"):
        trained({**ALL_AUTO, "train_batch_size": 4}, tmp_path, batch=16)


def test_auto_is_what_a_wish_or_the_profile_says_and_else_the_narrow_format(tmp_path):
    both = {**BATCHES, "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    only_fp16 = {**BATCHES, "fp16": {"enabled": "auto"}}
    for config, wish, profiled, precision in (
        (both, None, None, "bf16"),
        (both, Precision.FP16, None, "fp16"),
        (both, Precision.FP32, None, "fp32"),
        (both, None, Precision.FP32, "fp32"),
        (only_fp16, None, None, "fp16"),
        (only_fp16, None, Precision.BF16, "fp16"),
    ):
        assert trained(config, tmp_path, precision=wish, profiled=profiled).values.precision == precision


def test_what_is_written_is_no_question_of_wishes(tmp_path):
    for config in (
        {**BATCHES, "bf16": {"enabled": True}},
        {**BATCHES, "bf16": {"enabled": True}, "fp16": {"enabled": "auto"}},
    ):
        assert trained(config, tmp_path).values.precision == "bf16"
        with pytest.raises(PlanningError, match="--precision is in the configuration already"):
            trained(config, tmp_path, precision=Precision.BF16)


@pytest.mark.parametrize(
    ("wish", "said"),
    [(Precision.BF16, 'only fp16.enabled is "auto"'), (Precision.AMP, "without a torch_autocast section")],
)
def test_a_wish_that_the_file_leaves_no_room_for_is_refused(tmp_path, wish, said):
    with pytest.raises(PlanningError, match=said):
        trained({**BATCHES, "fp16": {"enabled": "auto"}}, tmp_path, precision=wish)


def test_the_changes_show_auto_with_what_it_comes_to(tmp_path):
    verdict = judged_auto(ALL_AUTO, tmp_path, batch=8)
    shown = {change.key: change.theirs for change in verdict.changes}
    assert shown[f"{Z}.stage"] == "3"
    assert '"auto"' not in shown.get(f"{Z}.offload_param.device", "")
    sizes = {key.removeprefix(f"{Z}."): text for key, text in shown.items() if key.removeprefix(f"{Z}.") in SIZES}
    assert sizes
    assert all(text == f'"auto", {SIZES[name]:,}' for name, text in sizes.items())
    assert "bf16.enabled true" in printed(verdict)


def test_of_a_model_without_an_embedding_deepspeeds_sizes_are_counted_and_that_is_said(tmp_path):
    verdict = judge(MODEL, AMPLE, RATES, trained(ALL_AUTO, tmp_path, batch=8))
    assert verdict.theirs.buckets.reduce_elements == 500_000_000
    assert any("hidden size" in remark and "reduce_bucket_size" in remark for remark in verdict.remarks)

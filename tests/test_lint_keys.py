"""keys.json says what DeepSpeed's own classes say."""

import enum
import json
import typing
import warnings

import pytest

from memplan.lint.document import parse_document
from memplan.lint.schema import schema
from memplan.lint.values import known_keys
from memplan.lint.view import View

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    deepspeed = pytest.importorskip("deepspeed")
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime import config as runtime
    from deepspeed.runtime import lr_schedules, precision_config
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.tensor_parallel.config import TPConfig, TPTrainingConfig
    from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

pytestmark = pytest.mark.skipif(
    deepspeed.__version__.split("+")[0] != schema().deepspeed, reason="keys.json describes another version of DeepSpeed"
)

CLASSES = {
    "zero_optimization": zero.DeepSpeedZeroConfig,
    "zero_optimization.offload_param": offload_config.DeepSpeedZeroOffloadParamConfig,
    "zero_optimization.offload_optimizer": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.zenflow": ZenFlowConfig,
    "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
    "fp16": precision_config.DeepSpeedFP16Config,
    "bf16": precision_config.DeepSpeedBF16Config,
    "tensorboard": monitor.TensorBoardConfig,
    "wandb": monitor.WandbConfig,
    "csv_monitor": monitor.CSVConfig,
    "comet": monitor.CometConfig,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "tensor_parallel": TPTrainingConfig,
    "tensor_parallel.tp": TPConfig,
    "hybrid_engine": HybridEngineConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
    "weight_quantization": WeightQuantConfig,
}


def section(name):
    return schema().sections[tuple(name.split("."))]


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_is_a_key_with_its_default_and_limits(name):
    keys = section(name).keys
    for field_name, field in CLASSES[name].model_fields.items():
        key = keys[field.alias or field_name]
        if field.alias:
            assert key.also == field_name
        if key.status == "refused" or "section" in key.types:
            continue
        default = field.get_default(call_default_factory=True)
        assert key.default == (default.value if isinstance(default, enum.Enum) else default), field_name
        limits = {n: getattr(m, n) for m in field.metadata for n in ("ge", "gt", "le", "lt") if hasattr(m, n)}
        if limits:
            assert (key.min, key.above, key.max, key.below) == tuple(limits.get(n) for n in ("ge", "gt", "le", "lt"))
        choices = [c for c in (field.annotation, *typing.get_args(field.annotation)) if isinstance(c, type)]
        for choice in (c for c in choices if issubclass(c, enum.Enum)):
            assert set(key.values) == {member.value for member in choice}


@pytest.mark.parametrize("name", CLASSES)
def test_every_key_of_a_checked_section_is_a_field(name):
    assert section(name).checked
    fields = CLASSES[name].model_fields
    names = {*fields, *(field.alias for field in fields.values())}
    for key in section(name).keys.values():
        assert key.name in names or key.status in ("removed", "refused"), key.name


VALUES = (True, False, None, 0, 1, 2, -1, 0.5, 1.0, 1.5, 5e8, 1e12, "", "x", "1", "5e3", "0.5", "-1", "1_000")
VALUES += ("True", "false", "yes", "off", "on", "n", "auto", [], [1], ["a"], {}, {"a": 1}, "cpu", "none", "CPU")


@pytest.mark.parametrize("name", CLASSES)
def test_a_value_is_an_error_exactly_where_the_class_refuses_it(name):
    path = tuple(name.split("."))
    for key in section(name).keys.values():
        if key.status in ("removed", "refused", "deprecated") or {"section", "any"} & set(key.types):
            continue
        # What these take depends on other keys, or is looked at later.
        if key.name in ("compute_grad_norm", "preset_model"):
            continue
        for value in VALUES:
            config = {key.name: value}
            try:
                CLASSES[name](**config)
                refused = False
            except (ValueError, AssertionError, TypeError):
                refused = True
            for outer in reversed(path):
                config = {outer: config}
            found = known_keys(View(parse_document(json.dumps(config))))
            errors = [f for f in found if f.severity == "error" and f.path == f"{name}.{key.name}"]
            assert bool(errors) == refused, (key.name, value, errors)


def test_sections_that_no_class_checks_are_not_marked_as_checked():
    assert {".".join(path) for path, s in schema().sections.items() if s.checked} == set(CLASSES)


def test_the_removed_keys_are_those_that_deepspeed_refuses():
    top = {name for name, key in schema().sections[()].keys.items() if key.status == "removed"}
    assert top == set(runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    inner = {name for name, key in section("zero_optimization").keys.items() if key.status == "removed"}
    assert inner == set(runtime._REMOVED_ZERO_CONFIG_KEYS)


@pytest.mark.parametrize(
    ("name", "defaults"), [("aio", AIO_DEFAULT_DICT), ("activation_checkpointing", ACT_CHKPT_DEFAULT)]
)
def test_plain_sections_have_deepspeeds_defaults(name, defaults):
    assert {key.name: key.default for key in section(name).keys.values() if key.status is None} == defaults


class Recorder(dict):
    """Notes which keys are asked for."""

    def __init__(self, values, asked):
        super().__init__(values)
        self.asked = asked

    def get(self, key, default=None):
        self.asked.setdefault(key, default)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.setdefault(key, None)
        return super().__contains__(key)

    def __copy__(self):
        return self

    def keys(self):
        return self

    def copy(self):
        return self


def test_every_key_that_deepspeed_asks_for_is_known():
    asked = {}
    config = Recorder({"train_micro_batch_size_per_gpu": 1}, asked)
    runtime.DeepSpeedConfig(config)
    assert set(asked) - set(schema().sections[()].keys) == set()
    for name, default in asked.items():
        key = schema().sections[()].keys[name]
        if "section" not in key.types and key.status is None and default is not None:
            assert key.default == default, name


def test_every_key_of_expert_parallelism_is_known():
    asked = {}
    parse_autoep_config(Recorder({"enabled": False}, asked))
    keys = section("expert_parallel").keys
    assert set(asked) == set(keys)
    assert {n: d for n, d in asked.items() if keys[n].status is None} == {
        n: k.default for n, k in keys.items() if k.status is None
    }


def test_schedules_have_their_real_parameters():
    import inspect

    for name, keys in schema().schedulers.items():
        parameters = inspect.signature(getattr(lr_schedules, name)).parameters
        given = {n: p.default for n, p in parameters.items() if n != "optimizer"}
        required = {n for n, default in given.items() if default is inspect.Parameter.empty}
        assert {k.name for k in keys.values() if k.required} == required
        assert {k.name: k.default for k in keys.values() if not k.required} == {
            n: d for n, d in given.items() if n not in required
        }


def test_optimizers_have_their_real_parameters():
    import inspect

    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    # What DeepSpeed's engine takes out for itself, or puts in: no argument of the class.
    engines = {"adam_w_mode", "torch_adam", "fp32_optimizer_states", "adamw_mode", "max_grad_norm"}
    for name, variant, made in (
        ("adam", "cpu", DeepSpeedCPUAdam),
        ("adam", "gpu", FusedAdam),
        ("lion", "cpu", DeepSpeedCPULion),
        ("lion", "gpu", FusedLion),
        ("lamb", "all", FusedLamb),
        ("adagrad", "cpu", DeepSpeedCPUAdagrad),
    ):
        keys = schema().optimizers[name]["all"] | schema().optimizers[name][variant]
        parameters = inspect.signature(made.__init__).parameters
        given = {n: p.default for n, p in parameters.items() if n not in ("self", "params", "model_params")}
        ours = {n: k.default for n, k in keys.items() if n not in engines}
        theirs = {n: list(d) if isinstance(d, tuple) else d for n, d in given.items() if n not in engines}
        assert ours == theirs, (name, variant)


def test_all_of_it_is_json_that_a_person_can_edit():
    from importlib.resources import files

    data = json.loads((files("memplan.lint") / "keys.json").read_text())
    assert data["deepspeed"] == schema().deepspeed

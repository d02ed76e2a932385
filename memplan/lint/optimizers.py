"""The optimizer and the learning rate's schedule, with the parameters that are handed to them."""

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch

from memplan.lint.document import KeyPath
from memplan.lint.finding import Finding, Severity
from memplan.lint.kinds import is_number, shown
from memplan.lint.schema import Key, schema
from memplan.lint.unknown import nearest_name
from memplan.lint.values import value_findings
from memplan.lint.view import View, Z

TESTED = frozenset({"adam", "adamw", "adagrad", "lion", "muon", "muadam", "muadamw", "Adam", "AdamW", "Adagrad"})
"""With ZeRO; the mup ones are torch's Adam underneath."""
ONE_BIT = frozenset({"onebitadam", "onebitlamb", "zerooneadam"})
PINNABLE = frozenset({"adam", "adamw", "lion", "adagrad", "muon"})
"""Optimizers of which DeepSpeed has one for the CPU."""
RISES = (("warmup_min_lr", "warmup_max_lr"), ("cycle_min_lr", "cycle_max_lr"))
"""Where schedules begin to rise, and where they end."""


@cache
def _torch_names(module: str) -> frozenset[str]:
    """Classes of ``torch.optim``, or of its ``lr_scheduler``."""
    home = torch.optim if module == "optim" else torch.optim.lr_scheduler
    return frozenset(name for name, value in vars(home).items() if isinstance(value, type) and name[:1].isupper())


def optimizer(view: View) -> Iterator[Finding]:
    """Its type, what it goes with, and its parameters."""
    section = view.document.section("optimizer")
    if not section:
        # Who wrote the key knows what it asks for.
        forced = view.value("zero_force_ds_cpu_optimizer") and not view.written("zero_force_ds_cpu_optimizer")
        if view.device("offload_optimizer") != "none" and forced:
            yield view.say(
                "note",
                f"{Z}.offload_optimizer.device",
                "an optimizer that the script makes must be DeepSpeedCPUAdam or DeepSpeedCPULion; others are refused",
                "an optimizer section, or zero_force_ds_cpu_optimizer: false",
            )
        return
    name = view.optimizer
    if name is None:
        if "type" not in section:
            yield view.say("warning", "optimizer", "has no type, so DeepSpeed ignores it", 'optimizer.type: "AdamW"')
        return
    if name not in schema().optimizers and name not in _torch_names("optim"):
        yield _no_optimizer(view, name)
        return
    yield from _with_zero(view, name)
    yield from _parameters(view, name)


def _no_optimizer(view: View, name: str) -> Finding:
    if name.lower() in ONE_BIT:
        what = f"{name} is no longer there; DeepSpeed {schema().deepspeed} stops at start"
        return view.say("error", "optimizer.type", what, "AdamW")
    near = nearest_name(name, {*schema().optimizers, *_torch_names("optim")})
    by_case = {known.lower(): known for known in _torch_names("optim")}.get(name.lower())
    message = f"{name} is no optimizer of DeepSpeed or torch.optim; DeepSpeed stops at start"
    return view.say("error", "optimizer.type", message, by_case or near)


def _with_zero(view: View, name: str) -> Iterator[Finding]:
    offloaded = view.device("offload_optimizer") != "none"
    if view.stage > 0 and name not in TESTED and not view.value("zero_allow_untested_optimizer"):
        yield view.say(
            "error",
            "optimizer.type",
            f"{name} is not one that DeepSpeed has tested with ZeRO; it stops at start",
            "zero_allow_untested_optimizer: true",
        )
    if name == "lamb" and view.value("fp16.loss_scale") != 0:
        yield view.say("error", "fp16.loss_scale", "lamb needs a dynamic loss scale; DeepSpeed stops at start", "0")
    if name == "muon" and view.stage == 3 and view.value(f"{Z}.reduce_scatter"):
        yield view.say(
            "error",
            f"{Z}.reduce_scatter",
            "Muon at ZeRO stage 3 does not go with it; DeepSpeed stops at start",
            "false",
        )
    if name == "muon" and view.stage == 3 and view.value(f"{Z}.zero_quantized_gradients"):
        yield view.say("error", f"{Z}.zero_quantized_gradients", "does not go with Muon; DeepSpeed stops at start")
    torchs = bool(view.document.get("optimizer", "params", "torch_adam"))
    if offloaded and torchs and name in ("adam", "adamw") and view.stage > 0:
        yield view.say(
            "warning",
            "optimizer.params.torch_adam",
            "takes PyTorch's Adam instead of DeepSpeed's for the CPU: the offloaded step is slow",
            "false",
        )
    elif offloaded and name not in PINNABLE and view.stage > 0:
        yield view.say(
            "warning",
            "optimizer.type",
            f"{name} has no version of DeepSpeed's for the CPU: the offloaded step is slow",
            "AdamW",
        )
    partly = view.value(f"{Z}.offload_optimizer.ratio") < 1 or view.value(f"{Z}.offload_optimizer.super_offload")
    masters = view.value("fp16.fp16_master_weights_and_grads") or view.value("bf16.bf16_master_weights_and_grads")
    if offloaded and view.stage > 0 and (partly or masters) and (name not in ("adam", "adamw") or torchs):
        yield view.say(
            "error",
            "optimizer.params.torch_adam" if torchs else "optimizer.type",
            "a ratio below 1, super_offload and 16-bit masters need DeepSpeed's Adam for the CPU; DeepSpeed stops",
            "AdamW, without torch_adam",
        )


def _parameters(view: View, name: str) -> Iterator[Finding]:
    given = view.document.get("optimizer", "params")
    if not isinstance(given, dict):
        return
    if "max_grad_norm" in given:
        message = "not taken by optimizers; DeepSpeed stops at start"
        yield view.say("error", "optimizer.params.max_grad_norm", message, "gradient_clipping, at the top level")
    variants = schema().optimizers.get(name, {})
    if not variants:
        return
    where = "cpu" if view.device("offload_optimizer") != "none" else "gpu"
    if given.get("torch_adam") is True and "torch" in variants:
        where = "torch"
    known = {**variants["all"], **variants.get(where, {})}
    whose = {"cpu": f"{name} on the CPU", "torch": "PyTorch's Adam"}.get(where, name)
    known_elsewhere = {key for variant in variants.values() for key in variant}
    for key in given:
        if key not in known and key != "max_grad_norm":
            near = None if key in known_elsewhere else nearest_name(key, known)
            stops = "it is ignored" if name == "muon" else "DeepSpeed stops at start"
            yield view.say(
                "error", f"optimizer.params.{key}", f"no parameter of {whose}; {stops}", near or "leave it out"
            )
    yield from _values(view, ("optimizer", "params"), known)
    if "betas" in known:
        yield from _betas(view, name, given.get("betas"))
    if given.get("amsgrad") is True and name in ("adam", "adamw", "lamb") and where != "torch":
        yield view.say("error", "optimizer.params.amsgrad", "true is not supported; DeepSpeed stops at start", "false")


def _betas(view: View, name: str, betas: object) -> Iterator[Finding]:
    """Two shares. Whoever has a third, or one alone, hears of it at the first step only."""
    at = "optimizer.params.betas"
    if not isinstance(betas, list):
        return
    if len(betas) != 2 or not all(is_number(beta) for beta in betas):
        stops = "" if name == "muon" else "; DeepSpeed stops at the first step"
        yield view.say(
            "error",
            at,
            f"{shown(betas)} is not two numbers{stops}",
            "betas: [0.9, 0.99]" if name == "lion" else "betas: [0.9, 0.999]",
        )
        return
    for beta in betas:
        if not 0 <= beta < 1:
            yield view.say("error", at, f"{beta:g} is out of range: each must be at least 0 and less than 1")


def scheduler(view: View) -> Iterator[Finding]:
    """Its type, and its parameters."""
    section = view.document.section("scheduler")
    if not section:
        return
    name = view.value("scheduler.type")
    if "type" not in section:
        yield view.say("warning", "scheduler", "has no type, so DeepSpeed ignores it", 'scheduler.type: "WarmupLR"')
    if not isinstance(name, str):
        return
    if name not in schema().schedulers and name not in _torch_names("lr_scheduler"):
        names = {*schema().schedulers, *_torch_names("lr_scheduler")}
        message = f"{name} is no schedule of DeepSpeed or torch.optim.lr_scheduler; DeepSpeed stops at start"
        yield view.say("error", "scheduler.type", message, nearest_name(name, names))
        return
    given = section.get("params")
    if not isinstance(given, dict):
        yield view.say("error", "scheduler.params", "missing; DeepSpeed stops at start", "params: {}")
        return
    known = schema().schedulers.get(name)
    if known is None:
        return
    for key in given:
        if key not in known:
            message = f"no parameter of {name}; DeepSpeed stops at start"
            yield view.say("error", f"scheduler.params.{key}", message, nearest_name(key, known) or "leave it out")
    for key in known.values():
        if key.required and key.name not in given:
            yield view.say(
                "error", f"scheduler.params.{key.name}", f"missing, and {name} needs it; DeepSpeed stops at start"
            )
    yield from _values(view, ("scheduler", "params"), known)
    total, warmup = given.get("total_num_steps"), given.get("warmup_num_steps", 1000)
    if isinstance(total, int) and isinstance(warmup, int) and total < warmup:
        what = f"{total} is less than warmup_num_steps {warmup}: the warm-up is cut short"
        yield view.say("warning", "scheduler.params.total_num_steps", what)
    yield from _backwards(view, given)


def _backwards(view: View, given: dict[str, Any]) -> Iterator[Finding]:
    """A rate that falls where it is meant to rise."""
    for low, high in RISES:
        top = given.get(high)
        if high == "warmup_max_lr" and top is None:
            # WarmupLR takes the optimizer's, the other schedule a figure of its own.
            known = schema().schedulers.get(str(view.value("scheduler.type")), {}).get(high)
            top = (known.default if known is not None else None) or view.document.get("optimizer", "params", "lr")
        if is_number(given.get(low)) and is_number(top) and given[low] > top:
            what = f"{given[low]:g} is above {high}, {top:g}: the learning rate falls where it is meant to rise"
            yield view.say("warning", f"scheduler.params.{low}", what, f"swap {low} and {high}")


def _values(view: View, home: KeyPath, known: Mapping[str, Key]) -> Iterator[Finding]:
    for name, value in view.document.section(*home).items():
        if name in known:
            say = partial(_say, view, ".".join((*home, name)))
            yield from value_findings(known[name], value, False, (*home, name) in schema().filled, say)


def _say(view: View, dotted: str, severity: Severity, message: str, suggestion: str | None = None) -> Finding:
    return view.say(severity, dotted, message, suggestion)

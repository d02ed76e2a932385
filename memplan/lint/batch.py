"""The batch sizes: three numbers and the ranks, which have to agree."""

from collections.abc import Iterator

from memplan.lint.finding import Finding
from memplan.lint.view import View

TRAIN, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def batch_sizes(view: View) -> Iterator[Finding]:
    """train_batch_size = micro-batch x accumulation x ranks, whichever of them are written."""
    if any(view.is_auto(key) for key in (TRAIN, MICRO, STEPS)):
        return
    train, micro, steps = (view.value(key) for key in (TRAIN, MICRO, STEPS))
    if any(number is not None and number < 1 for number in (train, micro, steps)):
        return
    if train is None and micro is None:
        # A value of the wrong type is another rule's, and elasticity, which once chose both, is an error with advice.
        if "elasticity" not in view.document.root and all(view.document.get(key) is None for key in (TRAIN, MICRO)):
            at = STEPS if view.written(STEPS) else TRAIN
            yield view.say(
                "error", at, f"neither {TRAIN} nor {MICRO} is there; DeepSpeed stops at start", f"write {MICRO}"
            )
        return
    if train is not None:
        yield from _divided(view, train, micro, steps)


def _divided(view: View, train: int, micro: int | None, steps: int | None) -> Iterator[Finding]:
    ranks = view.ranks
    parts = [f"{number} {name}" for number, name in ((micro, "a micro-batch"), (steps, "accumulation steps")) if number]
    product = (micro or 1) * (steps or 1)
    if ranks is None:
        if train % product:
            yield view.say(
                "error",
                TRAIN,
                f"{train} is not a multiple of {' x '.join(parts)} = {product}; DeepSpeed stops at start on any number "
                "of ranks",
                f"{TRAIN} {_nearest_multiple(train, product)}",
            )
        elif micro and steps and view.facts.gpus is None:
            needed = train // product
            yield view.say(
                "note", TRAIN, f"right for {needed} data-parallel rank{'s' * (needed > 1)}, and no other number"
            )
        return
    total = product * ranks
    if micro and steps:
        if train != total:
            yield view.say(
                "error",
                TRAIN,
                f"{train} is not {micro} a micro-batch x {steps} accumulation steps x {ranks} ranks = {total}; "
                "DeepSpeed stops at start",
                f"{TRAIN} {total}, or leave it out",
            )
    elif train % total:
        whole = " x ".join([*parts, f"{ranks} ranks"])
        yield view.say(
            "error",
            TRAIN,
            f"{train} is not a multiple of {whole} = {total}; DeepSpeed stops at start",
            f"{TRAIN} {_nearest_multiple(train, total)}",
        )


def _nearest_multiple(number: int, of: int) -> int:
    return max(1, round(number / of)) * of

"""Offloading: what goes where, at which stage, and through which buffers."""

from collections.abc import Iterator

from memplan.disks import IN_MEMORY, NETWORK
from memplan.lint.finding import Finding
from memplan.lint.view import OLD_NAMES, View, Z

OPTIMIZER, PARAMETERS = f"{Z}.offload_optimizer", f"{Z}.offload_param"
PARTS = (("offload_optimizer", OPTIMIZER), ("offload_param", PARAMETERS))


def devices(view: View) -> Iterator[Finding]:
    """The stage that each kind of offloading needs."""
    for part, _ in PARTS:
        old = OLD_NAMES[part]
        if view.value(f"{Z}.{old}") and view.document.section(Z, part):
            yield view.say("error", f"{Z}.{old}", f"{part} is there too; DeepSpeed stops at start", f"remove {old}")
    optimizer, parameters = view.device("offload_optimizer"), view.device("offload_param")
    if optimizer != "none" and view.stage == 0:
        yield view.say(
            "error",
            f"{OPTIMIZER}.device",
            "at ZeRO stage 0 nothing is moved, and the CPU's optimizer that DeepSpeed makes all the same stops at "
            "parameters on the GPU",
            f"{Z}.stage: 1, 2 or 3",
        )
    elif optimizer == "nvme" and view.stage < 3:
        yield view.say(
            "warning",
            f"{OPTIMIZER}.device",
            f"at ZeRO stage {view.stage} nvme means cpu: the optimizer stays in host memory",
            f"{Z}.stage: 3, or device: cpu",
        )
    if parameters != "none" and view.stage < 3:
        yield view.say(
            "error",
            f"{PARAMETERS}.device",
            f"has an effect at ZeRO stage 3 only; at stage {view.stage} the parameters stay "
            "on the GPU, and nothing is said",
            f"{Z}.stage: 3",
        )
    yield from _ratio(view, optimizer)


def _ratio(view: View, optimizer: str) -> Iterator[Finding]:
    ratio = view.value(f"{OPTIMIZER}.ratio")
    if ratio < 1 and view.stage != 3:
        yield view.say(
            "error", f"{OPTIMIZER}.ratio", f"{ratio:g} needs ZeRO stage 3; DeepSpeed stops at start", "ratio: 1.0"
        )
    elif ratio < 1 and optimizer == "none":
        yield view.say("warning", f"{OPTIMIZER}.ratio", "nothing is offloaded, so there is nothing to split")
    if view.value(f"{OPTIMIZER}.super_offload") and view.stage != 3:
        yield view.say(
            "warning", f"{OPTIMIZER}.super_offload", f"has an effect at ZeRO stage 3 only, and this is {view.stage}"
        )
    elif view.value(f"{OPTIMIZER}.super_offload") and optimizer == "none":
        yield view.say(
            "error", f"{OPTIMIZER}.super_offload", "needs the optimizer off the GPU; device is none", "device: cpu"
        )
    if view.written(f"{OPTIMIZER}.cpuadam_cores_perc") and not view.value(f"{OPTIMIZER}.super_offload"):
        yield view.say("note", f"{OPTIMIZER}.cpuadam_cores_perc", "has an effect with super_offload only")


def paths(view: View) -> Iterator[Finding]:
    """Where NVMe is, and whether it is one."""
    for part, key in PARTS:
        if view.device(part) != "nvme" or view.stage < 3 or view.is_auto(f"{key}.nvme_path"):
            continue
        path = view.value(f"{key}.nvme_path")
        if not path:
            yield view.say(
                "error",
                f"{key}.nvme_path",
                "missing, and there is no default; DeepSpeed stops at start",
                f'{key}.nvme_path: "/a/directory/on/a/fast/disk"',
            )
        elif path in view.facts.filesystems:
            yield from _filesystem(view, f"{key}.nvme_path", path)


def _filesystem(view: View, key: str, path: str) -> Iterator[Finding]:
    kind = view.facts.filesystems[path]
    if kind is None:
        yield view.say("warning", key, f"{path} is not there on this machine; DeepSpeed makes it where it runs")
    elif kind in IN_MEMORY:
        yield view.say("warning", key, f"{path} is on {kind}: it takes host memory, not disk", "a directory on a disk")
    elif kind in NETWORK:
        yield view.say("warning", key, f"{path} is on {kind}: a network mount is slow", "a directory on a local disk")


STATES = {"adam": 4, "adamw": 4, "lion": 3, "adagrad": 3}
"""Tensors that a step of the optimizer has at hand: parameter, gradient, and its states."""
SWAPPED_BYTES = 1 << 20
"""Of a tensor, from which on DeepSpeed keeps it on NVMe; aio.block_size if that is more."""

SECTOR_BYTES = 512
"""What DeepSpeed itself aligns to."""


def buffers(view: View) -> Iterator[Finding]:
    """Buffers between NVMe and the rest: how many, and how large."""
    if view.stage < 3:
        return
    if view.device("offload_optimizer") == "nvme":
        yield from _optimizer_buffers(view)
    if view.device("offload_param") == "nvme" and view.facts.parameter_elements:
        yield from _buffer_size(view, view.facts.parameter_elements)
        yield from _buffer_count(view, view.facts.parameter_elements)


def requests(view: View) -> Iterator[Finding]:
    """What DeepSpeed asks the disk for at a time. Its files are open with O_DIRECT, which takes whole sectors."""
    on_disk = any(view.device(part) == "nvme" for part, _ in PARTS)
    size = view.value("aio.block_size")
    if on_disk and view.stage == 3 and size % SECTOR_BYTES:
        yield view.say(
            "error",
            "aio.block_size",
            f"{size} is no multiple of {SECTOR_BYTES}, and direct I/O takes nothing else; DeepSpeed stops when it "
            "first reads or writes",
            "block_size: 1048576",
        )


def _optimizer_buffers(view: View) -> Iterator[Finding]:
    key = f"{OPTIMIZER}.buffer_count"
    count, needed = view.value(key), STATES.get(view.optimizer or "adam", 3)
    name = view.optimizer or "Adam"
    if count < needed:
        yield view.say(
            "error",
            key,
            f"{count} is less than the {needed} tensors of a step of {name}: parameter, gradient, and states; "
            "DeepSpeed stops at the first step",
            f"buffer_count: {needed}",
        )
        return
    reads, writes = (view.value(f"{OPTIMIZER}.{name}") for name in ("pipeline_read", "pipeline_write"))
    # What is read ahead and what is still being written each have a set of buffers of their own.
    wanted = needed * (1 + bool(reads) + bool(writes))
    total = sum(view.facts.parameter_elements) if view.facts.parameter_elements else None
    one_group = total is not None and _share(total, view.ranks) <= view.value(f"{Z}.sub_group_size")
    if count < wanted and not one_group:
        pipelines = " and ".join(n for n, on in (("pipeline_read", reads), ("pipeline_write", writes)) if on)
        yield view.say(
            "warning",
            key,
            f"{count} is less than {wanted}, which {pipelines} takes for more than one sub-group of {name}: "
            '"ran out of swap buffers"',
            f"buffer_count: {wanted}",
        )


def _share(elements: int, ranks: int | None) -> int:
    """Of a parameter, on one rank."""
    return -(-elements // (ranks or 1))


def _on_nvme(view: View, parameters: tuple[int, ...]) -> list[int]:
    """Parameters, in order, that are swapped: the first ``max_in_cpu`` elements of a rank stay in host memory."""
    least = max(SWAPPED_BYTES, view.value("aio.block_size")) / view.element_bytes
    room, found = view.value(f"{PARAMETERS}.max_in_cpu"), []
    for elements in parameters:
        share = _share(elements, view.ranks)
        room -= share
        if room < 0 and share >= least:
            found.append(elements)
    return found


def _buffer_size(view: View, parameters: tuple[int, ...]) -> Iterator[Finding]:
    key = f"{PARAMETERS}.buffer_size"
    size, largest = view.value(key), max(parameters)
    # All of them pass through a buffer when the model is partitioned, wherever they stay.
    share = _share(largest, view.ranks)
    if share * view.element_bytes >= max(SWAPPED_BYTES, view.value("aio.block_size")) and share > size:
        split = "" if view.ranks in (None, 1) else f" / {view.ranks} ranks = {share:,} elements"
        yield view.say(
            "error",
            key,
            f"{size:,} elements do not hold the largest parameter, {largest:,}{split}; DeepSpeed stops at start",
            f"buffer_size: {share}",
        )


def _buffer_count(view: View, parameters: tuple[int, ...]) -> Iterator[Finding]:
    """A buffer is taken for as long as its parameter is not released, which the reuse distance puts off.

    At the turn from forward to backward everything stays whose next use is less than the distance away: what comes
    after a parameter is passed twice until then.
    """
    key = f"{PARAMETERS}.buffer_count"
    count, distance = view.value(key), view.value(f"{Z}.stage3_max_reuse_distance")
    persistent = view.value(f"{Z}.stage3_param_persistence_threshold")
    swapped, passed, kept = _on_nvme(view, parameters), 0, 0
    for elements in reversed(swapped):
        if 2 * passed >= distance:
            break
        kept += elements >= persistent
        passed += elements
    if kept > count:
        yield view.say(
            "warning",
            key,
            f"{count} buffers, but stage3_max_reuse_distance {distance:,} keeps {kept} parameters that are on NVMe "
            'between forward and backward, each in a buffer: "Not enough buffers"',
            f"{Z}.stage3_max_reuse_distance: 0, or buffer_count: {kept}",
        )

"""Memory that can not be swapped: what DeepSpeed locks and pins of the host, beside what it may."""

from collections.abc import Iterator

from memplan.formatting import format_bytes, format_count
from memplan.lint.finding import Finding
from memplan.lint.offload import OPTIMIZER, PARAMETERS
from memplan.lint.view import View, Z

MASTER_BYTES = 4


def pinned_memory(view: View) -> Iterator[Finding]:
    """Against the lock limit of a process, and against the memory of the host.

    Counted as the code allocates, for one rank with P = parameters / ranks, w bytes a weight:

    - swap buffers of parameters: buffer_count x buffer_size x w; of the optimizer: buffer_count x the largest
      sub-group x 4. These are locked by ``mlock``, whatever pin_memory says.
    - stage 3: w P for parameters that are offloaded, always pinned; (w + 4) P for gradients of an optimizer that is
      offloaded and pinned. Stages 1 and 2: (4 + w + 4) P for masters, weights and gradients.
    """
    if view.facts.parameter_elements is None:
        return
    total = sum(view.facts.parameter_elements)
    share = -(-total // (view.ranks or 1))
    locked = _swap_buffers(view, share)
    pinned = _pinned(view, share)
    limit = view.facts.memlock_bytes
    amount = sum(size for size, _, _ in locked)
    if limit is not None and amount > limit:
        how = " + ".join(words for _, words, _ in locked)
        yield view.say(
            "error",
            locked[0][2],
            f"buffers of {how} = {format_bytes(amount)} are locked, but the limit is {format_bytes(limit)}",
            "ulimit -l unlimited",
        )
    elif limit is not None and amount + sum(size for size, _, _ in pinned) > limit:
        everything = [*locked, *pinned]
        how = " + ".join(words for _, words, _ in everything)
        yield view.say(
            "warning",
            pinned[0][2],
            f"{how} = {format_bytes(sum(size for size, _, _ in everything))} are pinned by each rank, and the limit "
            f"on locked memory is {format_bytes(limit)}",
            "ulimit -l unlimited, or pin_memory: false",
        )
    yield from _host(view, [*locked, *pinned])


def _host(view: View, parts: list[tuple[int, str, str]]) -> Iterator[Finding]:
    host, ranks = view.facts.host_bytes, view.facts.gpus or 1
    amount = sum(size for size, _, _ in parts) * ranks
    if host is not None and amount > host:
        how = " + ".join(words for _, words, _ in parts)
        yield view.say(
            "error",
            parts[0][2],
            f"{ranks} x ({how}) = {format_bytes(amount)} are pinned, and the host has {format_bytes(host)}",
            "pin_memory: false, or less offloading",
        )


def _swap_buffers(view: View, share: int) -> list[tuple[int, str, str]]:
    found = []
    if view.stage == 3 and view.device("offload_param") == "nvme":
        count, size = (view.value(f"{PARAMETERS}.{key}") for key in ("buffer_count", "buffer_size"))
        width = view.element_bytes
        words = f"{count} x {format_count(size)} elements x {width} B"
        found.append((count * size * width, words, f"{PARAMETERS}.buffer_size"))
    if view.stage == 3 and view.device("offload_optimizer") == "nvme":
        count = view.value(f"{OPTIMIZER}.buffer_count")
        largest = max(view.facts.parameter_elements or (0,))
        group = min(share, view.value(f"{Z}.sub_group_size") + -(-largest // (view.ranks or 1)))
        words = f"{count} x {format_count(group)} elements of a sub-group x {MASTER_BYTES} B"
        found.append((count * group * MASTER_BYTES, words, f"{OPTIMIZER}.buffer_count"))
    return found


def _pinned(view: View, share: int) -> list[tuple[int, str, str]]:
    width, found = view.element_bytes, []
    parameters, optimizer = view.device("offload_param"), view.device("offload_optimizer")
    if view.stage == 3 and parameters != "none":
        held = min(share, view.value(f"{PARAMETERS}.max_in_cpu")) if parameters == "nvme" else share
        found.append((held * width, f"{format_count(held)} weights x {width} B", f"{PARAMETERS}.device"))
    if optimizer != "none" and view.value(f"{OPTIMIZER}.pin_memory") and view.stage > 0:
        gradients = MASTER_BYTES if optimizer == "cpu" or view.stage < 3 else 0
        each = width + gradients if view.stage == 3 else MASTER_BYTES + width + MASTER_BYTES
        what = "gradients" if view.stage == 3 else "masters, weights and gradients"
        found.append((share * each, f"{format_count(share)} {what} x {each} B", f"{OPTIMIZER}.pin_memory"))
    return found

"""The limits that a control group (v1 or v2) puts on this process: containers see the whole host elsewhere."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED = 1 << 60
"""v1 writes a number near 2^63 where there is no limit."""


def memory_limit(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """The smallest memory limit in bytes on the way up from this process's group, ``None`` where there is none."""
    return min((limit for limit, _ in _memory_groups(root, membership)), default=None)


def memory_headroom(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes that this process's groups still allow, file cache that can be dropped counted as free."""
    return min((max(0, limit - used) for limit, used in _memory_groups(root, membership)), default=None)


def cpu_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """Cores that the groups allow, as a fraction; ``None`` where there is no quota."""
    quotas = []
    for folder in _folders("cpu", root, membership):
        quota, period = (text_of(folder / "cpu.max") or "max 0").split()
        if quota == "max":
            quota = text_of(folder / "cpu.cfs_quota_us") or "-1"
            period = text_of(folder / "cpu.cfs_period_us") or "0"
        if int(quota) > 0 and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _memory_groups(root: Path, membership: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that can not be dropped) of every group with a limit."""
    for folder in _folders("memory", root, membership):
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = text_of(folder / limit_file)
            if limit is None or limit == "max" or int(limit) >= UNLIMITED:
                continue
            used = int(text_of(folder / usage_file) or 0)
            yield int(limit), max(0, used - _inactive_file_bytes(folder / "memory.stat"))


def _folders(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """This process's group for a controller, and the groups around it."""
    for line in (text_of(membership) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        # In a container the path may name a group of the host that can not be seen from inside: the root still can.
        folder = base / path.lstrip("/")
        while folder != base:
            if folder.is_dir():
                yield folder
            folder = folder.parent
        yield base


def _inactive_file_bytes(stat: Path) -> int:
    for line in (text_of(stat) or "").splitlines():
        key, _, value = line.partition(" ")
        if key in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def text_of(path: Path) -> str | None:
    """What the kernel writes in a file; ``None`` where it can not be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return None

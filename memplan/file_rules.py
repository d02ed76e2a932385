"""What the values of machine and calibration files must be: people write and change such files too."""

from collections.abc import Mapping
from typing import Any

from memplan.errors import MachineError
from memplan.sizes import MOST_BYTES, MOST_COUNT
from offload.figures import (
    POSITIVE,
    TEXT,
    TEXTS,
    YES_OR_NO,
    Rule,
    each,
    list_of,
    number,
    or_none,
    strange,
    whole,
    wrong,
)

OBJECT = Rule(lambda value: isinstance(value, Mapping), "an object")
SOME_OBJECT = or_none(OBJECT)
OBJECTS, INDICES = list_of(OBJECT, "objects"), list_of(whole(0), "whole numbers")
SHARE = Rule(lambda value: number(0, 1).holds(value) and value > 0, "a number above 0 and at most 1")
BYTES, COUNT = whole(0, "bytes", MOST_BYTES), whole(1, most=MOST_COUNT)

MACHINE = {
    "device": Rule(lambda value: value in ("cuda", "cpu"), "'cuda' or 'cpu'"),
    "gpu_name": or_none(TEXT),
    **dict.fromkeys(("gpus", "nodes"), COUNT),
    **dict.fromkeys(("gpu_bytes", "host_bytes", "nvme_bytes", "context_bytes"), BYTES),
    **dict.fromkeys(("memlock_bytes", "host_growth_bytes"), or_none(BYTES)),
    "nvme_dir": or_none(TEXT),
    "cores": or_none(whole(1)),
    "described": YES_OR_NO,
    **dict.fromkeys(("nvlink", "nvme_bytes_per_second"), or_none(POSITIVE)),
    **dict.fromkeys(("link", "disk"), SOME_OBJECT),
    "numa_nodes": OBJECTS,
    "remarks": TEXTS,
}
LINK = {**dict.fromkeys(("generation", "width"), whole(1)), "c2c_bytes_per_second": or_none(POSITIVE)}
DISK = {
    "directory": TEXT,
    "free_bytes": whole(0, "bytes"),  # file systems of a network say what they like
    "filesystem": or_none(TEXT),
    **dict.fromkeys(("network", "in_memory", "direct_io"), YES_OR_NO),
}
NUMA_NODE = {"index": whole(0), "cores": INDICES, "memory_bytes": or_none(BYTES), "gpus": INDICES}

RATES = {
    **dict.fromkeys(
        ("compute_flops_per_second", "cpu_update_seconds", "gpu_update_seconds", "streamed_update_seconds"),
        each(POSITIVE),
    ),
    **dict.fromkeys(("host_to_device", "device_to_host", "collective"), OBJECT),
    **dict.fromkeys(
        (
            "device_bytes_per_second",
            "nvme_read_bytes_per_second",
            "nvme_write_bytes_per_second",
            "pinning_bytes_per_second",
        ),
        POSITIVE,
    ),
    "call_seconds": number(),
    **dict.fromkeys(("duplex_share", "links_beside_update"), SHARE),
    **dict.fromkeys(("cpu_update_beside_links", "cpu_update_beside_streamed", "streamed_update_beside_cpu"), number(1)),
    "inter_node_bytes_per_second": or_none(POSITIVE),
    "spread": number(0, 1),
    **dict.fromkeys(("source", "fingerprint"), TEXT),
    "facts": each(TEXT),
    "tables": each(list_of(TEXTS, "lists of strings")),
    "skipped": TEXTS,
    **dict.fromkeys(("kernels", "machine"), SOME_OBJECT),
}
CURVE = {
    "sizes_bytes": list_of(whole(1, "bytes"), "whole numbers, at least 1"),
    "bytes_per_second": list_of(POSITIVE, "numbers above 0"),
}


def check_values(data: Mapping[str, Any], rules: Mapping[str, Rule], of: type, source: str, inside: str = "") -> None:
    """Raise MachineError, naming ``source``, the key and what it must be, for data that is not as ``of`` needs it."""
    if said := strange(data, of, inside, "memplan calibrate makes such files") or wrong(data, rules, inside):
        raise MachineError(f"{source}: {said}")

"""What the values of machine and calibration files must be: people write and change such files too."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from memplan.errors import MachineError
from memplan.sizes import MOST_BYTES, MOST_COUNT
from offload.figures import POSITIVE, TEXT, YES_OR_NO, Rule, each, number, or_none, whole, wrong

OBJECT = Rule(lambda value: isinstance(value, Mapping), "an object")
SOME_OBJECT = or_none(OBJECT)
OBJECTS = Rule(lambda value: isinstance(value, list) and all(map(OBJECT.holds, value)), "a list of objects")
INDICES = Rule(lambda value: isinstance(value, list) and all(map(whole(0).holds, value)), "a list of whole numbers")
SENTENCES = Rule(lambda value: isinstance(value, list) and all(map(TEXT.holds, value)), "a list of strings")
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
    "remarks": SENTENCES,
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
    "skipped": SENTENCES,
    **dict.fromkeys(("kernels", "machine"), SOME_OBJECT),
}


def check_values(data: Mapping[str, Any], rules: Mapping[str, Rule], of: type, source: str, prefix: str = "") -> None:
    """Raise MachineError, naming ``source``, the key and what it must be, for data that is not as ``of`` needs it."""
    known = {field.name: field.default is MISSING and field.default_factory is MISSING for field in fields(of)}
    for name, needed in known.items():
        if needed and name not in data:
            raise MachineError(f"{source}: {prefix}{name} is missing; memplan calibrate makes such files")
    if strange := [name for name in data if name not in known]:
        raise MachineError(f"{source}: {prefix}{strange[0]} is nothing that this version knows; take it out")
    if said := wrong(data, rules, prefix):
        raise MachineError(f"{source}: {said}")

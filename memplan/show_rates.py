"""A machine's rates as tables for people."""

from collections.abc import Iterator, Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memplan.calibrate.parts import Rows, gigabytes, nanoseconds
from memplan.rates import Rates
from offload.plan import Precision
from profiler.calibration import Calibration
from profiler.device import find_device
from profiler.errors import ProfilerError

MATMUL_SIZES = (256, 1024, 4096, 16384)
TYPICAL_BYTES = 64 << 20


def rates_tables(rates: Rates) -> RenderableType:
    """What plans use, then everything that was measured by group, and what was not."""
    tables = [_table("what plans use", _used(rates))]
    tables += [_table(name, rows) for name, rows in rates.tables.items()]
    if rates.kernels is not None:
        tables += [_table(f"matmul, {name}", rows) for name, rows in _matmuls(rates.kernels)]
    notes = Text("\n".join(f"- {sentence}" for sentence in rates.skipped), style="yellow")
    return Group(Text(rates.source, style="bold"), *tables, notes) if rates.skipped else Group(*tables)


def _table(title: str, rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.show_header = any(rows[0])
    for index, head in enumerate(rows[0]):
        table.add_column(head, justify="right" if index else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _used(rates: Rates) -> Rows:
    def by_precision(values: Mapping[Precision, float]) -> str:
        return ", ".join(f"{p} {nanoseconds(values[p])}" for p in Precision if p in values)

    up, down, together = (c.at(TYPICAL_BYTES) for c in (rates.host_to_device, rates.device_to_host, rates.collective))
    flops = rates.compute_flops_per_second
    longer, kept = rates.cpu_update_beside_links, rates.links_beside_update
    rows = [
        ("", ""),
        ("training", ", ".join(f"{p} {flops[p] / 1e12:.3g} TFLOP/s" for p in Precision if p in flops)),
        (
            "host to device, device to host",
            f"{gigabytes(up)}, {gigabytes(down)}; at once {rates.duplex_share:.2f} of it",
        ),
        ("update on the host", by_precision(rates.cpu_update_seconds)),
        (
            "beside transfers",
            f"{longer:.2f} x as long; the link keeps {kept:.2f}",
        ),
        ("update in the device's memory", by_precision(rates.gpu_update_seconds)),
    ]
    if rates.streamed_update_seconds:
        rows.append(("update streamed through the GPU", by_precision(rates.streamed_update_seconds)))
        beside = f"CPU {rates.cpu_update_beside_streamed:.2f} x, GPU {rates.streamed_update_beside_cpu:.2f} x as long"
        rows.append(("both updates at once", beside))
    disk = f"{gigabytes(rates.nvme_read_bytes_per_second)}, {gigabytes(rates.nvme_write_bytes_per_second)}"
    rows += [("disk read, write", disk), ("each GPU sends in a node", gigabytes(together))]
    return tuple(rows)


def _matmuls(kernels: Calibration) -> Iterator[tuple[str, Rows]]:
    """TFLOP/s of square products and of those with few rows, from the grid that was timed."""
    try:
        device = find_device(kernels.device)
    except ProfilerError:
        return
    for dtype, arithmetic, size in (("bfloat16", "bf16", 2), ("float32", "fp32", 4)):
        if f"matmul/{dtype}" not in kernels.rates:
            continue
        rate = kernels.rates[f"matmul/{dtype}"]
        rows = [("rows", *(f"{n} x {n}" for n in MATMUL_SIZES))]
        for m in MATMUL_SIZES:
            cells = []
            for n in MATMUL_SIZES:
                flops, moved = 2 * m * n * n, (2 * m * n + n * n) * size
                ideal = max(flops / device.peak(arithmetic), moved / device.memory_bytes_per_second)
                cells.append(f"{flops / rate.seconds(ideal, (m, n, n)) / 1e12:.3g} TFLOP/s")
            rows.append((str(m), *cells))
        yield dtype, tuple(rows)

"""What the benchmarks share: the machine, the models, and where results go."""

import json
import platform
import statistics
import threading
import time
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from offload.on_meta import on_meta

RESULTS = Path(__file__).parent / "results"

LLAMAS = {
    # hidden, layers, heads, key-value heads, ffn, vocabulary
    "tiny": (256, 4, 8, 4, 1024, 4096),
    "1b": (2048, 16, 32, 8, 8192, 128256),
    "3b": (3072, 28, 24, 8, 8192, 128256),
    "8b": (4096, 32, 32, 8, 14336, 128256),
    "14b": (5120, 40, 40, 8, 17408, 151936),
    "20b": (6144, 47, 48, 8, 16384, 128256),
}
LARGE = ("8b", "14b", "20b")
"""Those that are built on meta, and whose head is not the embedding."""


class HostPeak(threading.Thread):
    """The most host memory: that this process held, and that the machine came to use since the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self.begun_bytes, self._used_before = self._now()
        self.resident_bytes = self.used_bytes = 0

    def _now(self) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        # Not what is available alone: a virtual machine can be given more memory as it uses it.
        return self._process.memory_info().rss, memory.total - memory.available

    def run(self) -> None:
        """Look again and again."""
        while True:
            resident, used = self._now()
            self.resident_bytes = max(self.resident_bytes, resident)
            self.used_bytes = max(self.used_bytes, used - self._used_before)
            time.sleep(0.02)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {"gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None, **host()}


def host() -> dict[str, Any]:
    """The same without the GPU, which can not be asked for its name without initialising CUDA."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(psutil.Process().cpu_affinity() or ()),
        "host_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def llama_config(shape: tuple[int, ...], **more: Any) -> Any:
    """The configuration of a Llama of a shape as in ``LLAMAS``."""
    from transformers import LlamaConfig

    hidden, layers, heads, kv_heads, ffn, vocabulary = shape
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        vocab_size=vocabulary,
        **more,
    )


def llama(size: str) -> nn.Module:
    """A Llama in fp32, from a configuration; the same weights every time. Only an engine makes a large one real."""
    from transformers import LlamaForCausalLM

    large = size in LARGE
    config = llama_config(LLAMAS[size], tie_word_embeddings=not large, use_cache=False, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), on_meta() if large else nullcontext():
        model = LlamaForCausalLM(config)
    return model.train()


def spread(errors: Iterable[float]) -> tuple[float, float, float]:
    """Median, 95th percentile and largest of the errors without their signs."""
    found = sorted(map(abs, errors))
    return statistics.median(found), found[min(len(found) - 1, int(0.95 * len(found)))], found[-1]


def save(name: str, rows: list[dict[str, Any]], **facts: Any) -> Path:
    """Write ``results/NAME.json`` with the machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "machine": machine(), **facts, "rows": rows}, indent=1) + "\n")
    return path

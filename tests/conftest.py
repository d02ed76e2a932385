"""What all tests share."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, and OpenMP's threads spin while they wait for each other: where cores are fewer than
    # threads, two teams took ten times as long as one thread each. Tests of teams set the size themselves.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Speed is measured in benchmarks/, never asserted by a test.
settings.register_profile("memplan", deadline=None)
# A change must not be refused for an example that chance found in code that it never touched: there the examples are
# always the same ones. New ones are looked for where somebody works.
settings.register_profile("ci", settings.get_profile("memplan"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "memplan")


@pytest.fixture(autouse=True, scope="session")
def no_calibration_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rates that somebody measured here and keeps must not decide what tests see."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each kind of device that an engine computes on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(request.param)

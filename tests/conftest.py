"""What all tests share."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Speed is measured in benchmarks/, never asserted by a test.
settings.register_profile("memplan", deadline=None)
settings.load_profile("memplan")


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

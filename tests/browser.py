"""What a browser makes of a page."""

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")


def drawn_values(html: str) -> list:
    """The traces of every chart, as they stand in the page."""
    starts = re.finditer(r'Plotly\.newPlot\(\s*"[^"]+",\s*', html)
    return [json.JSONDecoder().raw_decode(html, match.end())[0] for match in starts]


def drawn_charts(page: Path) -> list[str]:
    """The markup of every chart once a browser has drawn it, which must say nothing on its console."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
        command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return re.split(r"id=[\"']chart\d", done.stdout)[1:]

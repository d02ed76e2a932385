"""The page of a profile."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from memplan.profile_page import profile_page, write_profile_page
from tests.browser import drawn_charts, drawn_values, needs_browser
from tests.shown_profiles import shown_profile

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Outline(HTMLParser):
    """Headings and cells, and whether every tag is closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in {"h1", "h2", "td", "th", "b", "p", "div", "summary"}:
            self.texts.append(data.strip())


@pytest.fixture(scope="module")
def timed():
    return profile_page(shown_profile(device="NVIDIA H200 SXM"))


def test_the_page_says_how_it_was_made(timed):
    assert re.search(r"batch 8, amp, adamw; profiled with memplan on PyTorch \d+\.\d+\S*, \d{4}-\d\d-\d\d", timed)


def test_the_page_is_well_formed_and_has_every_part(timed):
    page = Outline(timed)
    assert page.open == []
    headings = ["Peak memory of a step", "Step", "What the peak in backward is made of", "Memory over a step"]
    headings += ["Memory by module", "FLOPs by layer", "Time by layer", "Time by operation", "Layers"]
    assert [text for text in page.texts if text in headings] == headings
    for text in ("75.0 MiB", "580 MiB", "activations from mm in layers.*.up (8)", "layers.0-3", "no formula"):
        assert text in page.texts


def test_the_page_needs_no_other_file_and_holds_the_library_once(timed):
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=[\"'](?!data:)", timed)
    assert len(re.findall(r"plotly\.js v\d", timed)) == 1


def test_what_a_model_says_is_never_markup(timed):
    assert "<expert>" not in timed
    profile = replace(shown_profile(), model="<script>alert(1)</script>")
    assert "<script>alert" not in profile_page(profile)


def test_the_timeline_adds_up_to_what_is_allocated(timed):
    timeline, *_ = drawn_values(timed)
    *areas, total = timeline
    assert {area["name"] for area in areas} == {"parameters", "optimizer state", "activations"}
    assert [sum(levels) for levels in zip(*(area["y"] for area in areas), strict=True)] == total["y"]
    assert max(total["y"]) == 75


def test_the_modules_tiles_add_up_to_the_models_memory():
    profile = shown_profile()
    _, (tiles,), _ = drawn_values(profile_page(profile))
    trained = sum(p.bytes for p in profile.parameters if p.trainable)
    parameters = sum(p.bytes for p in profile.parameters)
    assert tiles["values"][0] == parameters + 3 * trained + profile.layers[0].activation_bytes
    assert tiles["parents"][0] == ""
    inside = {}
    for parent, value in zip(tiles["parents"], tiles["values"], strict=True):
        inside[parent] = inside.get(parent, 0) + value
    sizes = dict(zip(tiles["ids"], tiles["values"], strict=True))
    assert all(sizes[parent] == value for parent, value in inside.items() if parent)


def test_the_bars_add_up_to_the_models_flops():
    profile = shown_profile()
    _, _, bars = drawn_values(profile_page(profile))
    assert {bar["name"]: sum(bar["x"]) for bar in bars} == {
        "forward": profile.forward_flops,
        "backward": profile.backward_flops,
        "recompute": 500_000,
    }


def test_without_a_device_there_is_nothing_about_time():
    assert "Time by" not in profile_page(shown_profile())


def test_a_profile_with_nothing_to_draw_has_a_page():
    profile = shown_profile()
    bare = replace(profile, timeline=(), peak_contents=(), operations=(), parameters=(), layers=profile.layers[:1])
    assert Outline(profile_page(bare)).open == []


@needs_browser
def test_a_browser_draws_every_chart_without_an_error(tmp_path):
    write_profile_page(shown_profile(device="NVIDIA H200 SXM"), tmp_path / "page.html")
    timeline, tiles, *bars = drawn_charts(tmp_path / "page.html")
    assert len(re.findall(r'<path class="js-fill"', timeline)) >= 3
    assert len(re.findall(r'class="slice', tiles)) > 5
    assert len(bars) == 3
    assert all(re.search(r'<g class="point"><path d="M', bar) for bar in bars)

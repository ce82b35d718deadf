"""The page in headless Chromium, as a user clicks it. Skipped where there is no Chromium."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 120_000  # milliseconds: a busy machine is no failure
expect.set_options(timeout=PATIENCE)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(chromium: Browser, address: str, width: int = 1280, scheme: str = "light") -> Page:
    """The page after its first answers."""
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    expect(page.locator("#answers tr")).to_have_count(4)
    return page


def test_a_question_gives_four_answers_a_map_and_timings(chromium: Browser, address: str):
    page = opened(chromium, address)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.get_by_label("Question", exact=True).fill("Is there a cat in the image?")
    page.get_by_role("button", name="ask").click()
    rows = page.locator("#answers tr")
    expect(rows).to_have_count(4)
    for number, mode in enumerate(("vanilla", "two-pass", "one-pass", "auto")):
        expect(rows.nth(number)).to_contain_text(mode)
        expect(rows.nth(number).locator("td").nth(1)).to_have_text(re.compile(r"[\d.]+ %"))
    expect(rows.nth(1)).to_contain_text(re.compile(r"ms \([\d.]+ x\)"))
    expect(page.locator("#overlay rect[fill^=rgb]")).to_have_count(144)
    expect(page.locator("#facts")).to_contain_text("overlap")
    expect(page.locator("#fitted")).to_contain_text("predictor: ")
    assert all(url.startswith((address, "data:")) for url in asked) and len(asked) > 5
    page.close()


def test_overlays_follow_keys_and_sliders_ask_again(chromium: Browser, address: str):
    page = opened(chromium, address)
    page.get_by_label("sources of").select_option("two-pass")
    expect(page.locator("#overlay .hit")).to_have_count(8)
    page.locator("#strength").focus()
    page.keyboard.press("Tab")  # to the slider of K
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#overlay .hit")).to_have_count(5)
    expect(page.locator("#code")).to_contain_text("num_sources=5")
    expect(page.locator("#notes")).to_contain_text("num_sources is 5, was 8")
    page.locator("h1").click()
    page.keyboard.press("n")
    assert page.locator("#overlay .tie").count() > 5
    page.keyboard.press("1")
    expect(page.locator("#overlay rect[fill^=rgb]")).to_have_count(0)
    page.keyboard.press("4")
    expect(page.locator("#legend")).to_contain_text("predicted too high")
    page.get_by_role("button", name="reset").click()
    expect(page.locator("#overlay .hit")).to_have_count(8)
    page.close()


def test_pictures_are_dropped_in_and_bad_ones_get_a_message(chromium: Browser, address: str, tmp_path: Path):
    page = opened(chromium, address)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.set_input_files("#file", tmp_path / "broken.png")
    expect(page.get_by_role("alert")).to_contain_text("could not be read as a picture")
    expect(page.get_by_role("alert")).to_contain_text("; the picture below is unchanged.")
    assert (page.locator("#picture").get_attribute("src") or "").startswith("view/")
    with (tmp_path / "large.png").open("wb") as large:
        large.truncate(25_000_000)
    page.set_input_files("#file", tmp_path / "large.png")
    expect(page.get_by_role("alert")).to_contain_text("large.png has 25 MB; this page takes at most 20 MB")
    page.set_input_files("#file", Path(__file__).parents[2] / "docs/images/maps.png")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#code")).to_contain_text("Image.open('maps.png')")
    page.get_by_role("button", name="caption").click()
    expect(page.locator("#answers tr").first.locator("td").first).to_have_text(re.compile(r"\w+ \w+ \w+"))
    page.close()


def test_an_empty_question_gets_a_message_until_one_is_typed(chromium: Browser, address: str):
    page = opened(chromium, address)
    page.locator("#question").fill(" ")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("Type a question.")
    page.locator("#question").fill("Is there a cat in the image?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_be_hidden()
    page.close()


def test_the_gallery_opens_a_scene_with_its_question(chromium: Browser, address: str):
    page = opened(chromium, address)
    page.get_by_label("sorted by").select_option("entropy")
    expect(page.locator("#ordered")).to_contain_text("highest credit entropy; 1 to 3 of 3")
    page.locator("#gallery button").nth(2).click()
    expect(page.locator("#picture")).to_have_attribute("src", "view/0")
    expect(page.locator("#gallery button").nth(2)).to_have_attribute("aria-pressed", "true")
    page.close()


@pytest.mark.parametrize(("width", "scheme", "background"), [(400, "light", 255), (1280, "dark", 20)])
def test_narrow_and_dark(chromium: Browser, address: str, width: int, scheme: str, background: int):
    page = opened(chromium, address, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour.startswith(f"rgb({background},")
    page.close()

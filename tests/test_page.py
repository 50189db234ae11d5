"""The page, played in a browser: pip install playwright, and a chromium on the PATH."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
from steering_fixtures import make_generators
from test_serve import serving

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--no-first-run"]
SELECT = """([first, last]) => {
  const place = document.getElementById("text"), range = document.createRange();
  range.setStart(place.childNodes[first], 0);
  range.setEnd(place.childNodes[last], 0);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
}"""


class Seen:
    """A page and what it said."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.errors, self.outside = page, [], []
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.on("request", lambda r: self.outside.append(r.url) if url not in r.url else None)
        page.goto(url)
        self.until("document.querySelectorAll('#model option').length > 0")

    def get(self, what: str) -> Any:
        return self.page.evaluate(f"() => {what}")

    def until(self, truth: str) -> None:
        """Its policy has no eval, which wait_for_function needs."""
        deadline = time.monotonic() + 60
        while not self.get(f"Boolean({truth})"):
            assert time.monotonic() < deadline, truth
            time.sleep(0.02)

    def done(self) -> str:
        self.until("!stop && final")
        return str(self.get("final"))


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    generators = make_generators()
    with serving({"twin": generators["twin"]}) as up, sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield Seen(browser.new_page(), up.url)
        browser.close()


def test_a_text_is_written_looked_through_and_rewritten_by_keyboard(seen: Seen) -> None:
    page = seen.page
    page.locator("#prompt").fill("the quick ")
    page.locator("#tokens").fill("32")
    page.locator("#prompt").focus()
    page.keyboard.press("Control+Enter")
    text = seen.done()
    assert text.startswith("the quick ")
    assert page.text_content("#text") == text
    frames = seen.get("frames.length")
    assert frames > 2 and page.inner_text("#scrub-out") == "8 of 8"
    page.locator("#scrub").focus()
    page.keyboard.press("Home")
    assert page.inner_text("#scrub-out") == "1 of 8"
    assert page.locator("#text .hole").count() > 0
    page.keyboard.press("End")
    assert page.text_content("#text") == text
    page.locator("#seed").fill("9")
    page.evaluate(SELECT, [3, 7])
    seen.until("selection")
    first, last = seen.get("selection")
    page.locator("#rewrite").focus()
    page.keyboard.press("Enter")
    seen.until("!final || stop")
    again = seen.done()
    assert again.startswith(text[:first]) and again.endswith(text[last:])
    assert (seen.errors, seen.outside) == ([], [])


def test_gaps_are_filled_and_numbers_of_calls_compared(seen: Seen) -> None:
    page = seen.page
    page.locator("#prompt").fill("the [[4]] dog [[3]].")
    page.locator("#write").click()
    seen.until("stop || final")
    text = seen.done()
    assert text.startswith("the ") and " dog " in text and text.endswith(".")
    page.locator("#compare").click()
    seen.until("!stop && document.querySelectorAll('#many > div').length === 5")
    heads = [page.locator("#many .dim").nth(k).inner_text() for k in range(5)]
    assert [head.split(" ")[0] for head in heads] == ["1", "2", "4", "8", "64"]
    assert all(head.endswith(" s") for head in heads)
    assert (seen.errors, seen.outside) == ([], [])


def test_a_span_is_selected_and_rewritten_by_keyboard_alone(seen: Seen) -> None:
    page = seen.page
    page.locator("#prompt").fill("the quick ")
    page.locator("#prompt").focus()
    page.keyboard.press("Control+Enter")
    seen.until("stop || !final")
    text = seen.done()
    assert seen.get("document.getElementById('side').hidden"), "it is of another text"
    page.locator("#text").focus()
    for key in ["ArrowRight"] * 3 + ["Shift+ArrowRight"] * 2:
        page.keyboard.press(key)
    seen.until("selection")
    first, last = seen.get("selection")
    assert 0 < first < last < len(text)
    while seen.get("document.activeElement.id") != "rewrite":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    seen.until("!final || stop")
    again = seen.done()
    assert again.startswith(text[:first]) and again.endswith(text[last:])
    assert (seen.errors, seen.outside) == ([], [])


def test_a_text_in_one_call_shows_what_was_given_of_it(seen: Seen) -> None:
    page = seen.page
    page.locator("#prompt").fill("the quick ")
    page.locator("#steps").fill("0")
    page.locator("#write").click()
    seen.until("stop || !final")
    text = seen.done()
    assert page.locator("#text .given").first.text_content() == "the quick "
    assert page.text_content("#text") == text
    page.locator("#steps").fill("3")


def test_what_cannot_be_done_is_said(seen: Seen) -> None:
    seen.page.locator("#prompt").fill("the [[4")
    seen.page.locator("#write").click()
    seen.until("!document.getElementById('error').hidden")
    assert "no ]] closes" in seen.page.inner_text("#error")
    assert seen.page.inner_text("#scrub-out") == "0", "there is nothing to look through"
    assert seen.get("document.documentElement.scrollWidth <= innerWidth")
    seen.page.set_viewport_size({"width": 360, "height": 640})
    assert seen.get("document.documentElement.scrollWidth <= innerWidth"), "on a phone, too"

"""How a text came about: recorded frames, the page that plays them, and the picture that moves."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from steering_fixtures import SOURCES, make_generators, twin_network
from test_generator import WORDS

from fsdfm.generate.gif import gif
from fsdfm.generate.request import Request
from fsdfm.generate.template import Fixed, Gap, write
from fsdfm.generate.trace import GIVEN, HOLE, NOISE, Recorder, Trace, page, warmth
from fsdfm.generate.watch import watch
from fsdfm.model.io.pretrained import save_pretrained
from fsdfm.text.tokenizer import HALF, train_bpe

GENERATORS = make_generators(64)
TEXT = "the quick brown fox — über 🦊\r\n jumps over"
REQUESTS = [
    {"length": 40},
    {"length": 40, "end": "trim"},
    {"prompt": "the quick 🦊", "suffix": "\r\n</script>", "length": 40},
    {"template": "[[3]]é🦊[[?]] was [[2-5]]"},
    {"text": TEXT, "span": [4, 9]},
    {"text": TEXT, "strength": 0.4},
    {"length": 150, "end": "keep"},
    {"length": 40, "stop": ["e", "a"]},
    {"length": 30, "ban": ["a", "e"], "require": ["fox"]},
    {"length": 24, "best_of": 3},
    {"length": 24, "steps": "auto"},
]


def record(source: str, values: dict[str, Any]) -> Trace:
    generator = GENERATORS[source]
    done: list[Any] = []
    recorder = Recorder(generator)
    request = Request.from_dict({"steps": 4, **values})
    list(watch(generator, request, done, recorder.see))
    assert done[0].text == generator.answer([request])[0].text
    return recorder.trace(done[0])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("values", REQUESTS, ids=lambda values: "-".join(values))
def test_the_last_frame_is_the_text_and_the_first_is_what_was_given(
    source: str, values: dict[str, Any]
) -> None:
    trace = record(source, values)
    states = trace.states()
    assert "".join(cell.text for cell in states[-1]) == trace.result.text
    if trace.result.finish == "length":
        assert not any(cell.call in (HOLE, NOISE) for cell in states[-1])
    assert max(len(cell.text) for cell in states[-1] if cell.call != GIVEN) < 16
    assert all(cell.call <= NOISE for cell in states[0])
    last = trace.frames[-1].step
    assert last >= max(cell.call for cell in states[-1]) > 0
    for before, now, frame in zip(states, states[1:], trace.frames[1:], strict=False):
        for old, new in zip(before, now, strict=True):
            halved = HALF in old.text + new.text  # a character that a neighbour makes whole
            if old.call == GIVEN:
                assert new == old or halved
            assert new.call == old.call or new.call <= frame.step


@given(
    st.text("ab é🦊\r\n<>&'\"", max_size=20),
    st.integers(1, 6),
    st.sampled_from(SOURCES),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_text_is_shown_as_it_is(text: str, size: int, source: str, seed: int) -> None:
    pieces = [Gap(size, size), *([Fixed(text)] if text else []), Gap(1, size)]
    trace = record(source, {"template": write(pieces), "seed": seed})
    assert "".join(cell.text for cell in trace.states()[-1]) == trace.result.text


def test_the_first_call_is_blue_and_the_last_red() -> None:
    first, last = warmth(1, 8, 0.5), warmth(8, 8, 0.5)
    assert max(first) == first[2] and max(last) == last[0]
    assert warmth(1, 1, 0.5) == first and warmth(9, 8, 0.5) == last


def data_of(html: str) -> Any:
    (line,) = re.findall(r"^const trace = (.*);$", html, re.M)
    return json.loads(line)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    trace = record("twin", REQUESTS[2])
    html = page(trace)
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|src=|href=|url\(|@import|<link", html)
    assert html.count("</script>") == 1  # the text has one too
    data = data_of(html)
    assert [len(f["changed"]) for f in data["frames"]] == [len(f.changed) for f in trace.frames]
    assert (data["calls"], data["seed"]) == (trace.result.calls, 0)
    assert "the quick 🦊" in html and "/* look" not in html


def test_the_page_goes_from_call_to_call(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium")
    trace, file = record("twin", REQUESTS[2]), tmp_path / "trace.html"
    file.write_text(page(trace))
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        seen, said, asked = browser.new_page(), [], []
        seen.on("console", lambda message: said.append(message.text))
        seen.on("pageerror", lambda error: said.append(str(error)))
        seen.on("request", lambda request: asked.append(request.url))
        seen.goto(file.as_uri())

        def shown() -> str:
            return str(seen.evaluate("document.getElementById('text').textContent"))

        assert shown() == trace.result.text
        seen.keyboard.press("Home")
        assert shown().count("··") == trace.result.tokens
        assert seen.text_content("#where") == "step 0 of 4"
        seen.keyboard.press("ArrowRight")
        assert seen.text_content("#where") == "step 1 of 4"
        first = {c.call for c in trace.states()[1]}
        assert 1 in first and seen.locator("#text .new").count() > 0
        seen.locator("#scrub").fill("4")
        assert shown() == trace.result.text
        seen.keyboard.press("Home")
        seen.keyboard.press("Space")
        seen.wait_for_timeout(700)
        assert seen.text_content("#where") != "step 0 of 4"
        browser.close()
    assert said == [] and len(asked) == 1


@pytest.mark.parametrize("values", [REQUESTS[3], REQUESTS[6]], ids=["template", "long"])
def test_a_gif_has_a_picture_for_every_frame(values: dict[str, Any]) -> None:
    image = pytest.importorskip("PIL.Image")
    trace = record("twin", values)
    picture = image.open(io.BytesIO(gif(trace)))
    assert picture.n_frames == len(trace.frames)
    assert picture.info["loop"] == 0
    colours = set()
    for number in (0, picture.n_frames - 1):
        picture.seek(number)
        colours.add(len(picture.convert("RGB").getcolors(4096)))
    assert len(colours) == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe([WORDS * 20], 300)
    save_pretrained(directory, twin_network(tokenizer), tokenizer_json=tokenizer.to_json())
    return directory


def test_the_command_writes_the_page_and_the_picture(run: Run, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    plain = run("generate", "--model", model, "--length", 20, "--steps", 3)[1]
    files = tmp_path / "trace.html", tmp_path / "trace.gif"
    argv = "--length", 20, "--steps", 3, "--trace", files[0], "--gif", files[1]
    assert run("generate", "--model", model, *argv) == (0, plain, "")
    assert len(data_of(files[0].read_text())["frames"]) == 4
    assert files[1].read_bytes().startswith(b"GIF89a")
    argv = "--length", 20, "--steps", 3, "--trace", tmp_path  # which is a directory
    code, text, err = run("generate", "--model", model, *argv)
    assert (code, text) == (2, plain) and err.startswith(f"error: Cannot write {tmp_path}")
    argv = "--length", 20, "--steps", 3, "--out", "/proc/none/text"
    for more in ((), ("--trace", tmp_path / "again.html")):
        code, text, err = run("generate", "--model", model, *argv, *more)
        assert (code, text) == (2, plain) and err.startswith("error: Cannot write /proc/none")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--trace TRACE --num-samples 2", "--trace is of one text: leave --num-samples out."),
        ("--trace TRACE --out TRACE", "--out, --trace and --gif are one file: name another."),
        ("--gif TRACE --requests IN --out OUT", "--gif is of one text: leave --requests out."),
        ("--gif TRACE", "A GIF needs Pillow: pip install 'fsdfm[gif]' brings it."),
    ],
)
def test_what_cannot_be_watched_is_one_line(
    run: Run,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: str,
    message: str,
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "PIL" else real(name, *rest),
    )
    words = [str(tmp_path / w.lower()) if w.isupper() else w for w in argv.split()]
    assert run("generate", "--model", model, *words) == (2, "", f"error: {message}\n")
    assert list(tmp_path.iterdir()) == []

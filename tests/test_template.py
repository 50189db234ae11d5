"""Templates, edits and drafts: what is given comes back to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from steering_fixtures import SOURCES, make_generators
from test_generator import WORDS

from fsdfm.core.errors import ConfigError
from fsdfm.generate.request import Request, Result
from fsdfm.generate.template import FREE, Fixed, Gap, Piece, parse, write

GENERATORS = make_generators(256)
TOKENIZER = GENERATORS["mask"].tokenizer
TEXT = "the quick brown fox — über 🦊\r\n jumps over the lazy dog"

# Brackets and backslashes are the template's own; emoji, accents and CRLF are cut by tokens.
FIXED = st.builds(
    Fixed, st.lists(st.sampled_from(list("ab [[]]\\?-3é🦊\r\n\u200d")), min_size=1).map("".join)
)
GAPS = st.builds(lambda low, more: Gap(low, low + more), st.integers(1, 4), st.integers(0, 2))


def pieces_of(draw: Any) -> list[Piece]:
    found: list[Piece] = []
    for piece in draw:
        if isinstance(piece, Fixed) and found and isinstance(found[-1], Fixed):
            continue  # two texts beside each other are one
        found.append(piece)
    return found


@given(st.lists(st.one_of(FIXED, GAPS), min_size=1, max_size=6).map(pieces_of))
@settings(max_examples=200, deadline=None)
def test_a_template_is_read_as_it_was_written(pieces: list[Piece]) -> None:
    if not any(isinstance(piece, Gap) for piece in pieces):
        return
    assert parse(write(pieces)) == pieces


TEMPLATES = (
    st.lists(st.one_of(FIXED, GAPS), min_size=1, max_size=6)
    .map(pieces_of)
    .filter(lambda pieces: any(isinstance(piece, Gap) for piece in pieces))
)


@given(st.lists(TEMPLATES, min_size=4, max_size=4), st.sampled_from(SOURCES), st.integers(0, 99))
@example([[Gap(2, 2), Gap(1, 3), Fixed("é\r\n🦊"), Gap(1, 1)]], "mask", 0)
@settings(max_examples=250, deadline=None)
def test_fixed_text_comes_back_to_the_byte(
    templates: list[list[Piece]], source: str, seed: int
) -> None:
    """Four templates at once: they share their calls."""
    requests = [
        Request(template=write(pieces), seed=seed, steps=1, end="never") for pieces in templates
    ]
    for pieces, result in zip(templates, GENERATORS[source].answer(requests), strict=True):
        check_fixed(pieces, result)


def check_fixed(pieces: list[Piece], result: Result) -> None:
    gaps = [piece for piece in pieces if isinstance(piece, Gap)]
    assert len(result.spans) == len(gaps)
    # Cut out what was written: what is left is what was given, in its place.
    spans, at = iter(result.spans), 0
    for piece in pieces:
        if isinstance(piece, Fixed):
            assert result.text[at : at + len(piece.text)].encode() == piece.text.encode()
            at += len(piece.text)
        else:
            first, last = next(spans)
            assert first == at
            at = last
    assert at == len(result.text)
    written = len(result.token_ids) - sum(
        len(TOKENIZER.encode(p.text)) for p in pieces if isinstance(p, Fixed)
    )
    assert written == result.tokens
    assert sum(g.low for g in gaps) <= written <= sum(g.high for g in gaps)


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        ("a [[12]] b", [Fixed("a "), Gap(12, 12), Fixed(" b")]),
        ("[[3-8]][[?]]", [Gap(3, 8), Gap(1, FREE)]),
        (r"x[0] \[[1]] [[ 2 ]]", [Fixed("x[0] [[1]"), Gap(2, 2)]),
        (r"\\[[2]]", [Fixed("\\"), Gap(2, 2)]),
        (r"C:\new [[2]]", [Fixed(r"C:\new "), Gap(2, 2)]),
    ],
)
def test_what_a_template_says(template: str, pieces: list[Piece]) -> None:
    if template.startswith("x"):
        template = template.replace(r"\[[1]]", r"\[[1\]")
        pieces = [Fixed("x[0] [[1] "), Gap(2, 2)]
    assert parse(template) == pieces


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "a [[12",
            "template has [[ at character 2 that no ]] closes: close the gap, or write \\[ ",
        ),
        ("a 12]]", "template has ]] at character 4 that no [[ opens: write \\] for a literal"),
        (
            "a [[]] b",
            "template has the gap [[]]: a gap is a number of tokens as in [[12]], a range",
        ),
        ("[[many]]", "template has the gap [[many]]: a gap is a number of tokens"),
        ("[[0]]", "template has the gap [[0]]: it needs 1 token or more"),
        ("[[8-3]]", "template has the gap [[8-3]]: it needs 1 token or more, and the smaller"),
        (f"[[{'9' * 5000}]]", "template has the gap [[999"),
        ("plain", "template has no gap: write [[12]] where 12 tokens are wanted"),
        ("", "template has no gap"),
        ("\\" * 300_000, "template has no gap"),  # in no time
    ],
)
def test_a_template_says_what_is_wrong_with_it(template: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(template)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("source", SOURCES)
def test_a_prompt_and_a_suffix_stand_at_the_ends(source: str) -> None:
    request = Request(prompt="the quick 🦊", suffix="\r\nagain", length=30)
    (result,) = GENERATORS[source].answer([request])
    assert result.text.startswith("the quick 🦊")
    assert result.text.endswith("\r\nagain")
    assert len(result.token_ids) == 30
    ((first, last),) = result.spans
    assert (first, last) == (len("the quick 🦊"), len(result.text) - len("\r\nagain"))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("span", [(0, 3), (4, 9), (20, 30), (len(TEXT) - 3, len(TEXT))])
def test_an_edit_leaves_the_rest_to_the_byte(source: str, span: tuple[int, int]) -> None:
    (result,) = GENERATORS[source].answer([Request(text=TEXT, span=span, seed=3)])
    first, last = span
    ((begin, end),) = result.spans
    assert begin == first
    assert result.text[:begin] == TEXT[:first]
    assert result.text[end:] == TEXT[last:]
    assert result.text != TEXT
    assert result.tokens == len(TOKENIZER.encode(TEXT[first:last]))


def test_the_strength_is_the_share_that_is_masked_again() -> None:
    text, generator = WORDS * 4, GENERATORS["twin"]
    draft = TOKENIZER.encode(text)
    for strength in (0.05, 0.5, 0.95):
        (result,) = generator.answer([Request(text=text, strength=strength, seed=1, end="keep")])
        drawn = [x is not None for x in result.logprobs]
        error = 4.5 * (strength * (1 - strength) / len(draft)) ** 0.5
        assert abs(sum(drawn) / len(draft) - strength) < error
        assert all(
            new == old
            for new, old, anew in zip(result.token_ids, draft, drawn, strict=True)
            if not anew
        )


def test_a_draft_of_a_uniform_model_is_told_its_time() -> None:
    generator, times = GENERATORS["uniform"], []
    hidden = generator.engine.hidden

    def told(x: torch.Tensor, t: tuple[float], *rest: Any) -> torch.Tensor:
        times.extend(t)
        return hidden(x, t, *rest)

    generator.engine.hidden = told  # type: ignore[method-assign]
    try:
        generator.answer([Request(text=WORDS, strength=0.4, steps=3, grid="even")])
    finally:
        generator.engine.hidden = hidden  # type: ignore[method-assign]
    assert times == pytest.approx([0.6, 0.6 + 0.4 / 3, 0.6 + 0.8 / 3])

"""`fsdfm generate`: texts in a pipe, one text while it settles in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fsdfm.cli.asked import ELSEWHERE, REPEATED, asked, values
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.errors import ConfigError
from fsdfm.core.options import AT_LEAST_1, check, option
from fsdfm.core.registry import Names
from fsdfm.generate.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """What is not said to `Generator.answer`."""

    model: str | None = option(None, form="DIR", unset="the bundled model")
    """Model or run directory, or org/name on the Hugging Face Hub."""
    adapter: str | None = option(None, form="DIR", unset="none")
    """Run directory of a training with lora, whose weights are added to those of the model."""
    prompt_file: str | None = option(None, form="FILE", unset="none; - for standard input")
    """File with the prompt, in UTF-8; one line end at its end is left out."""
    edit: str | None = option(None, form="FILE", unset="none; - for standard input")
    """File of which a span is written anew; the rest is kept to the byte."""
    span: str | None = option(None, form="A:B", unset="none")
    """Characters of the file to edit that are written anew, from A up to B."""
    initial: str | None = option(None, form="FILE", unset="none; - for standard input")
    """File with a draft of the text, of which a share (see strength) is written anew."""
    requests: str | None = option(None, form="FILE", unset="none")
    """File with a request a line, as JSON; other flags say what its lines leave open."""
    out: str | None = option(None, form="FILE", unset="standard output")
    """File for the text, or for the results of requests; those that it has are not done again."""
    trace: str | None = option(None, form="FILE.html", unset="none")
    """Page that shows how the text came about, with a slider over the calls; of one text."""
    gif: str | None = option(None, form="FILE.gif", unset="none")
    """The same as a picture that moves; needs Pillow."""
    num_samples: int = option(1, within=AT_LEAST_1)
    """Texts to generate; each takes the next seed."""
    batch_size: int = option(1, within=AT_LEAST_1)
    """Texts made together; more than 1 pays on a GPU, and for short texts."""
    device: str | None = option(None, form="DEVICE", unset="cuda, else mps, else cpu")
    """cpu, cuda, cuda:N or mps."""
    precision: str | None = option(
        None,
        choices=Names("fsdfm.generate.precision.PRECISIONS"),
        unset="what is fast here",
    )
    """Of the matrix products. By default int8 for adapted models on CPUs with VNNI and no AMX, else
    bfloat16 where it is fast, else float32."""
    json: bool = False
    """Print one JSON object per text: text, tokens, nfe, seed, seconds, tokens_per_second, spans,
    finish."""
    logprobs: bool = False
    """With JSON, also token_ids and logprobs."""

    def __post_init__(self) -> None:
        check(self)


ABOUT = "Generate text. In a terminal, one text is shown while it settles."


def run(argv: Sequence[str]) -> None:
    """Print texts; live in a terminal."""
    flags = Flags(of=Request, without=ELSEWHERE, repeated=REPEATED)
    request, given = parse("generate", ABOUT, argv, flags, Flags(of=Own))
    own = Own(**given)
    if own.logprobs and not own.json and own.requests is None:
        raise ConfigError("logprobs are told in JSON: give json too.", "logprobs", "json")
    fields = values(request, own)
    wanted = None if own.requests is not None else list(asked(fields, own.num_samples))
    from fsdfm.cli import writing

    if wanted is None:
        writing.batch(fields, own)
    else:
        writing.texts(wanted, own)

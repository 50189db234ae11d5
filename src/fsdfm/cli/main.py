"""The command line: the commands, their flags, and errors turned into exit codes.

Nothing here imports torch until a command has been chosen and its flags have been read.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from tyro.conf import Positional, arg

from fsdfm.core.errors import BenchError, ConfigError, DataError, FsdfmError
from fsdfm.core.files import one_line

if TYPE_CHECKING:
    from fsdfm.bench.figures import Row
    from fsdfm.generate.generator import Generator, Options, Sample, Snapshot
    from fsdfm.text.tokenizer import Tokenizer

T = TypeVar("T")

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
SEPARATOR = "---"
TABLE_WIDTH = 100

HELP = """\
Long text from a handful of model calls: few-step discrete flow matching.

  fsdfm generate                               text from the bundled model, in 8 model calls
  fsdfm prepare FILES... --out DATA            text files -> tokenizer and packed tokens
  fsdfm pretrain --data DATA --out TEACHER     train a model from scratch
  fsdfm adapt MODEL --data DATA --out TEACHER  make one of a causal language model
  fsdfm distill --teacher TEACHER --data DATA --out STUDENT
                                               teach it to write in a few steps
  fsdfm generate --model STUDENT               text from your own model
  fsdfm evaluate --model STUDENT --out REPORT  judge its texts, at several budgets
  fsdfm compare REPORT...                      reports side by side
  fsdfm convert FILE DIR --tokenizer FILE      a published checkpoint -> model directory
  fsdfm bench                                  speed and memory here, beside references

Each command explains its flags: fsdfm COMMAND --help.  fsdfm --version prints the version.
"""

MODEL_DECIDES = "(default: the model's own)"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateArgs:
    """Generate text. In a terminal, one text is shown while it settles."""

    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint=MODEL_DECIDES)] = None
    """The budget in model calls; any number from 1."""
    length: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: 1024, or the context)")
    ] = None
    """Tokens of a text, with its prompt."""
    num_samples: int = 1
    """Texts to generate."""
    seed: int = 0
    """Seed of the first text; text k takes SEED + k."""
    model: Annotated[
        str | None, arg(metavar="DIR", help_behavior_hint="(default: the bundled model)")
    ] = None
    """Model or run directory, or org/name on the Hugging Face Hub."""
    temperature: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint=MODEL_DECIDES)] = (
        None
    )
    """Divides the logits: below 1 safer, above 1 wilder, 0 the likeliest token."""
    top_p: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint=MODEL_DECIDES)] = None
    """Draw only the likeliest tokens that together have this mass."""
    step: Annotated[
        Literal["exact", "published", "euler"] | None,
        arg(metavar="{exact,published,euler}", help_behavior_hint=MODEL_DECIDES),
    ] = None
    """Step rule of the sampler."""
    movers: Annotated[
        Literal["independent", "systematic"] | None,
        arg(metavar="{independent,systematic}", help_behavior_hint=MODEL_DECIDES),
    ] = None
    """How the positions that move in a step are chosen."""
    grid: Annotated[
        Literal["even", "late", "latest"] | None,
        arg(metavar="{even,late,latest}", help_behavior_hint=MODEL_DECIDES),
    ] = None
    """Times of the model calls: evenly spaced, long steps first, or nearly all in the first
    (for joint heads)."""
    draws: Annotated[int | None, arg(metavar="K", help_behavior_hint=MODEL_DECIDES)] = None
    """Groups in which the positions of a call are drawn, each knowing the ones before: more are
    better and slower (models with a joint head)."""
    prompt: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="(optional)")] = None
    """Text that every sample starts with."""
    prompt_file: Annotated[
        str | None, arg(metavar="FILE", help_behavior_hint="(optional; - for standard input)")
    ] = None
    """File with that text, in UTF-8; one line end at its end is left out."""
    batch_size: int = 1
    """Texts made together; more than 1 pays on a GPU only."""
    device: Annotated[
        str | None, arg(metavar="DEVICE", help_behavior_hint="(default: cuda, else mps, else cpu)")
    ] = None
    """cpu, cuda, cuda:N or mps."""
    precision: Annotated[
        Literal["float32", "bfloat16", "int8"] | None,
        arg(
            metavar="{float32,bfloat16,int8}",
            help_behavior_hint="(default: bfloat16 where it is fast)",
        ),
    ] = None
    """Of the matrix products; int8 is faster for large models on CPUs with AVX512-VNNI or AMX."""
    json: bool = False
    """Print one JSON object per text: text, tokens, nfe, seed, seconds, tokens_per_second."""

    def options(self) -> Options:
        """The arguments of `Generator.generate`."""
        elsewhere = ("model", "device", "precision", "json", "prompt_file")
        names = [field.name for field in fields(self) if field.name not in elsewhere]
        options: Any = {name: getattr(self, name) for name in names}
        found: Options = options
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareArgs:
    """Turn text files into a tokenizer and packed tokens, ready for training."""

    files: Positional[Annotated[tuple[Path, ...], arg(metavar="FILES", help_behavior_hint="")]]
    """.txt or .jsonl files, also as .gz or .zst."""
    out: Path
    """Directory to write."""
    vocab_size: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: 8192, or all of --tokenizer)")
    ] = None
    """Tokens of the byte-level BPE that is trained on the files; with --tokenizer, how many of its
    tokens to keep: those that the files use most, and their parts."""
    tokenizer: Annotated[
        str | None, arg(metavar="FILE|MODEL", help_behavior_hint="(default: train one)")
    ] = None
    """A tokenizer.json to use, or a language model whose tokenizer to use: whatever fsdfm adapt
    takes."""
    validation_fraction: float = 0.02
    """Share of the documents that is kept from training."""
    seed: int = 0
    """Decides which documents those are."""
    field: str = "text"
    """Field of the .jsonl files' objects that holds the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertArgs:
    """Turn a published checkpoint into a model directory."""

    checkpoint: Positional[Annotated[Path, arg(metavar="FILE")]]
    """The checkpoint: .pth (networks by name, or one state dict) or .safetensors."""
    out: Positional[Annotated[Path, arg(metavar="OUT_DIR")]]
    """Model directory to write."""
    tokenizer: Annotated[Path, arg(metavar="FILE")]
    """tokenizer.json that the network was trained with (GPT-2's, for the published ones)."""
    weights: Annotated[
        Literal["student_ema", "student", "teacher", "model"] | None,
        arg(
            metavar="{student_ema,student,teacher,model}",
            help_behavior_hint="(default: student_ema, else the first of these that is there)",
        ),
    ] = None
    """Which of its networks to take."""
    heads: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: the file's, or its shape's)")
    ] = None
    """Heads of the attention, where the file lacks rotary_emb.inv_freq, which tells them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareArgs:
    """Put reports side by side and say which differences are real."""

    reports: Positional[Annotated[tuple[Path, ...], arg(metavar="REPORT ...")]] = ()
    """Directories of fsdfm evaluate, or their report.json; the first model is the baseline."""
    baseline: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(default: the first)")
    ] = None
    """Model to compare with, by its name in the reports."""
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(optional)")] = None
    """Write the comparison to this Markdown file too."""


class _Stopped(Exception):
    """Training was interrupted, saved its state and said so."""


def generate(args: GenerateArgs) -> None:
    """Print texts; live in a terminal."""
    if args.prompt_file is not None:
        args = replace(args, prompt=_prompt(args))
    terminal = Console()
    with _status("Loading the model"):
        from fsdfm.generate.generator import load

        generator = load(args.model, device=args.device, precision=args.precision)
    if terminal.is_terminal and not terminal.is_dumb_terminal and not args.json:
        _generate_on_terminal(generator, args, terminal)
        return
    batches = generator.batches(**args.options())
    for number, sample in enumerate(sample for batch in batches for sample in batch):
        _write(_json_line(sample) if args.json else _separated(sample.text, number))


def _prompt(args: GenerateArgs) -> str:
    """The text of the prompt's file, less one line end at its end (editors and echo add it).

    Raises:
        ConfigError: there is a prompt besides.
        DataError: the file cannot be read, or is not UTF-8.
    """
    if args.prompt is not None:
        raise ConfigError("--prompt and --prompt-file are both given: leave one out.")
    name = "Standard input" if args.prompt_file == "-" else str(args.prompt_file)
    try:
        if args.prompt_file == "-":
            data = sys.stdin.buffer.read() if sys.stdin is not None else b""
        else:
            data = Path(name).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"Cannot read {name}: {one_line(error)}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 (byte {error.start}): convert it first.") from None
    return text.removesuffix("\n").removesuffix("\r")


def _generate_on_terminal(generator: Generator, args: GenerateArgs, terminal: Console) -> None:
    from fsdfm.generate.live import printable, show

    if args.num_samples == 1:
        options = args.options()
        del options["batch_size"]
        last: Snapshot = show(generator.stream(**options), terminal)
        _write(printable(last.text) + "\n")
        rate = last.tokens / last.seconds
        _note(_cost(last.tokens, last.calls, last.seconds, rate, args.seed))
        return
    batches, done = generator.batches(**args.options()), 0
    while done < args.num_samples:
        with _status(f"Generating text {done + 1} of {args.num_samples}"):
            batch = next(batches)
        for sample in batch:
            _write(_separated(printable(sample.text), done))
            cost = sample.tokens, sample.nfe, sample.seconds, sample.tokens_per_second
            _note(_cost(*cost, sample.seed))
            done += 1


def prepare(args: PrepareArgs) -> None:
    """Pack text files and say what came out."""
    titles = {"split": "Holding out", "tokenizer": "Training a tokenizer", "tokens": "Packing"}
    with _bars(titles) as progress:
        from fsdfm.text.packing import PrepareSettings, prepare

        manifest = prepare(
            list(args.files),
            args.out,
            settings=PrepareSettings(
                vocab_size=args.vocab_size,
                validation_fraction=args.validation_fraction,
                seed=args.seed,
                field=args.field,
            ),
            tokenizer=_tokenizer(args.tokenizer) if args.tokenizer else None,
            progress=progress,
        )
    train, validation = (manifest["splits"][name] for name in ("train", "validation"))
    in_both = manifest["split_documents"]
    documents = train["documents"] + validation["documents"] - in_both
    split = ", one of them split (its end is for validation)" if in_both else ""
    _write(
        f"{args.out}: {train['tokens']:,} training and {validation['tokens']:,} validation tokens "
        f"of {documents:,} document{'s' * (documents != 1)}{split}, "
        f"vocabulary {manifest['vocab_size']:,}\n"
    )


def _tokenizer(name: str) -> Tokenizer:
    """That of a file, or of a language model."""
    from fsdfm.text.tokenizer import Tokenizer

    if name.endswith(".json") or (Path(name).is_file() and not name.endswith(".gguf")):
        return Tokenizer.from_file(name)
    from fsdfm.model.io.causal_lm import load_tokenizer_json
    from fsdfm.text.vocabulary import completed

    return completed(Tokenizer.from_json(load_tokenizer_json(name), name=name))


def pretrain(argv: Sequence[str]) -> None:
    """Train a teacher."""
    from fsdfm.recipes.settings import PretrainArgs

    args = _parse(PretrainArgs, "pretrain", argv)
    from fsdfm.recipes import training

    if not training.pretrain(args):
        raise _Stopped


def adapt(argv: Sequence[str]) -> None:
    """Make a flow model of a language model."""
    from fsdfm.recipes.settings import AdaptArgs

    args = _parse(AdaptArgs, "adapt", argv)
    from fsdfm.recipes import training

    if not training.adapt(args):
        raise _Stopped


def distill(argv: Sequence[str]) -> None:
    """Train a few-step student."""
    from fsdfm.recipes.settings import DistillArgs

    args = _parse(DistillArgs, "distill", argv)
    from fsdfm.recipes import training

    if not training.distill(args):
        raise _Stopped


def convert(args: ConvertArgs) -> None:
    """Convert a published checkpoint."""
    with _status("Converting"):
        from fsdfm.model.io.convert import convert_published
        from fsdfm.text.tokenizer import Tokenizer

        config = convert_published(
            args.checkpoint,
            args.out,
            tokenizer_json=Tokenizer.from_file(args.tokenizer).to_json(),
            weights=args.weights,
            heads=args.heads,
        )
    _write(
        f"{args.out}: {config.blocks} blocks of width {config.hidden_size}, "
        f"{config.vocab_size} tokens, {config.source} source, "
        f"{'no step size' if config.step_embedding == 'none' else 'step-aware'}\n"
    )


def evaluate(argv: Sequence[str]) -> None:
    """Judge models; a bar on a terminal, a line for every row elsewhere."""
    from fsdfm.eval.settings import EvaluateArgs

    args = _parse(EvaluateArgs, "evaluate", argv)
    with _status("Loading"):
        from fsdfm.core.files import write_whole
        from fsdfm.eval import evaluation, plots
        from fsdfm.eval.tables import markdown, section

    plots.check()
    try:
        with _work("Loading models and judge") as progress:
            report = evaluation.evaluate(args, progress)
    except KeyboardInterrupt:
        _note(f"What is done is kept in {args.out}: run the same command again to go on.")
        raise
    if report is None:
        return
    text = markdown(report)
    files = plots.plot(report, args.out)
    if files:
        text += "\n## Plots\n\n" + "".join(f"![{file.stem}]({file.name})\n" for file in files)
    write_whole(args.out / "report.md", text)
    for task in report.tasks():
        _write(f"{task}\n\n")
        _write("\n".join(section(report, task)) + "\n\n")
    _note(f"Written: {args.out / 'report.md'}, report.json" + ", plots" * bool(files))


def compare(argv: Sequence[str]) -> None:
    """Put reports side by side."""
    args = _parse(CompareArgs, "compare", argv)
    from fsdfm.core.files import write_whole
    from fsdfm.eval.report import load_report
    from fsdfm.eval.several import different_judges, shared_judges
    from fsdfm.eval.tables import comparison, named_rows

    labels = {str(path): load_report(path) for path in args.reports}
    if not labels:
        raise ConfigError("compare needs reports: fsdfm compare REPORT...")
    reports = list(labels.items())
    first = reports[0][1].facts
    for name, report in reports[1:]:
        same = report.facts["heldout"].get("sha256") == first["heldout"].get("sha256")
        if not same or report.facts["length"] != first["length"]:
            raise ConfigError(
                f"{name} and {reports[0][0]} differ in {'length' if same else 'heldout'}: their "
                "figures cannot be compared; evaluate again with the same."
            )
    reports = shared_judges(reports)
    judges = reports[0][1].judges
    if left_out := different_judges(labels.values(), judges):
        _note(f"Left out, because not all reports have them: {', '.join(left_out)}.")
    rows = named_rows(reports)
    models = list(dict.fromkeys(named.name for named in rows if named.row.kind == "model"))
    if not models:
        raise ConfigError(f"{reports[0][0]} has no model's rows: there is nothing to compare.")
    baseline = models[0] if args.baseline is None else args.baseline
    if baseline not in models:
        raise ConfigError(f"There is no model {baseline!r}: choose {', '.join(models)}.")
    text = comparison(rows, baseline, judges)
    if args.out is not None:
        write_whole(args.out, text)
    _write(text + "\n")


def bench(argv: Sequence[str]) -> None:
    """Measure speed and memory; one table for each task."""
    from fsdfm.bench.benchmark import BenchArgs

    args = _parse(BenchArgs, "bench", argv)
    with _work("Starting the sides") as progress:
        from fsdfm.bench import autoregressive, benchmark
        from fsdfm.bench.sides import NO_AUTOREGRESSIVE

        machine, rows = benchmark.bench(args, progress)
    if args.json:
        _write(json.dumps({**machine, "rows": [row.to_dict() for row in rows]}) + "\n")
    else:
        _write(f"{', '.join(f'{name} {value}' for name, value in machine.items())}\n")
        _write(_tables(rows))
    if not autoregressive.available():
        _note(NO_AUTOREGRESSIVE)
    if failed := [row.error for row in rows if row.error is not None]:
        for error in failed[:-1]:
            _note(f"error: {error}")
        raise BenchError(failed[-1])


def _tables(rows: Sequence[Row]) -> str:
    """The rows as text, for the terminal or for a pipe."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fsdfm.bench.figures import HEADERS, cells, grouped

    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    with console.capture() as capture:
        for name, group in grouped(rows).items():
            table = Table(title=name, title_justify="left", box=SIMPLE_HEAD)
            for header in HEADERS:
                table.add_column(header, justify="left" if header == "side" else "right")
            for row in group:
                table.add_row(*cells(row))
            console.print(table)
    return capture.get()


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "generate": lambda argv: generate(_parse(GenerateArgs, "generate", argv)),
    "prepare": lambda argv: prepare(_parse(PrepareArgs, "prepare", argv)),
    "pretrain": pretrain,
    "adapt": adapt,
    "distill": distill,
    "evaluate": evaluate,
    "compare": compare,
    "convert": lambda argv: convert(_parse(ConvertArgs, "convert", argv)),
    "bench": bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process if not given.

    Returns:
        Exit code: 0; 2 for a user's mistake, told in one line on stderr; 130 when interrupted;
        141 when the reader of the output went away.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries' deprecations are no news for our users
    _use_utf8(sys.stdout)
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except FsdfmError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except _Stopped:
        return INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return BROKEN_PIPE


def _run(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
    elif argv and argv[0] in ("-h", "--help"):
        _write(HELP)
    elif argv and argv[0] == "--version":
        _write(f"fsdfm {importlib.metadata.version('fsdfm')}\n")
    else:
        wrong = f"there is no command {argv[0]!r}" if argv else "a command is missing"
        raise ConfigError(f"{wrong}: choose {', '.join(COMMANDS)}, or see fsdfm --help.")
    return 0


def _parse(kind: type[T], command: str, argv: Sequence[str]) -> T:
    """Flags -> dataclass; on a wrong flag tyro explains it and exits with code 2."""
    return tyro.cli(
        kind,
        prog=f"fsdfm {command}",
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff),
    )


def _json_line(sample: Sample) -> str:
    names = ("text", "tokens", "nfe", "seed", "seconds", "tokens_per_second")
    return json.dumps({name: getattr(sample, name) for name in names}, ensure_ascii=False) + "\n"


def _separated(text: str, number: int) -> str:
    return f"{SEPARATOR}\n{text}\n" if number else f"{text}\n"


def _cost(tokens: int, calls: int, seconds: float, rate: float, seed: int) -> str:
    return (
        f"{tokens:,} tokens in {calls} model calls, {seconds:.2f} s, {rate:,.0f} tokens/s, "
        f"seed {seed}"
    )


def _write(text: str) -> None:
    """Print to stdout, now."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_stdout()
        raise DataError(f"Cannot write the output: {one_line(error)}.") from None


def _note(text: str) -> None:
    """A dim line on stderr, for people."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text, style="dim")


@contextlib.contextmanager
def _status(text: str) -> Iterator[None]:
    """A spinner on stderr; nothing where nobody watches."""
    console = Console(stderr=True)
    with console.status(text) if console.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _bars(titles: Mapping[str, str]) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on stderr, one for each phase, told (phase, bytes done, bytes in all)."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars: dict[str, TaskID] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in bars:
                bars[phase] = progress.add_task(titles.get(phase, phase))
            progress.update(bars[phase], completed=done, total=total)

        yield advance


@contextlib.contextmanager
def _work(first: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr with an ETA, told (what was done, done, in all); lines without a terminal."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar, last = progress.add_task(first, total=None), ""
        started = time.monotonic()

        def advance(label: str, done: int, total: int) -> None:
            nonlocal last
            progress.update(bar, description=label, completed=done, total=total)
            if not console.is_terminal and label != last:
                left = (time.monotonic() - started) / done * (total - done)
                console.print(f"{label}  {done}/{total}  ETA {left / 60:.1f} min")
            last = label

        yield advance


def _use_utf8(stream: Any) -> None:
    """What is piped on is UTF-8; a terminal gets its own encoding, with what it lacks replaced."""
    if not isinstance(stream, io.TextIOWrapper):
        return
    if stream.isatty():
        stream.reconfigure(errors="replace")
    else:
        stream.reconfigure(encoding="utf-8")


def _discard_stdout() -> None:
    """Let the interpreter's own last flush succeed."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

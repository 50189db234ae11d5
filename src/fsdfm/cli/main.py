"""The command line: commands, and errors turned into exit codes.

A command is a module of this room with `run(argv)`; it is imported when it is chosen, so that
`fsdfm --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import warnings
from collections.abc import Sequence

from fsdfm.cli.console import Stopped, discard_stdout, use_utf8, write
from fsdfm.core.errors import ConfigError, FsdfmError
from fsdfm.core.files import one_line
from fsdfm.core.waiting import wait_briefly

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
COMMANDS = (
    "generate",
    "prepare",
    "data",
    "pretrain",
    "adapt",
    "distill",
    "plan",
    "plot",
    "evaluate",
    "compare",
    "baseline",
    "convert",
    "merge",
    "prune",
    "quantize",
    "bench",
    "serve",
)

HELP = """\
Long text from a handful of model calls: few-step discrete flow matching.

  fsdfm generate                               text from the bundled model, in 8 model calls
  fsdfm prepare SOURCES... --out DATA          texts -> tokenizer and packed tokens
  fsdfm data DATA                              what they hold, whether they are whole, samples
  fsdfm pretrain --data DATA --out TEACHER     train a model from scratch
  fsdfm adapt MODEL --data DATA --out TEACHER  make one of a causal language model
  fsdfm distill --teacher TEACHER --data DATA --out STUDENT
                                               teach it to write in a few steps
  fsdfm plan --preset 1.7B --gpus 8            what a training takes: memory, FLOPs, days
  fsdfm plot RUN... --out FILE.png             curves of trainings
  fsdfm generate --model STUDENT               text from your own model
  fsdfm evaluate --model STUDENT --out REPORT  judge its texts, at several budgets
  fsdfm compare REPORT...                      reports side by side
  fsdfm baseline ngram --data DATA --out TEXTS.jsonl
                                               texts of a plain language model, to compare with
  fsdfm convert FILE DIR --tokenizer FILE      a published checkpoint -> model directory
  fsdfm merge MODEL ADAPTER DIR                a model and what --lora trained -> model directory
  fsdfm prune MODEL DIR --data DATA --layers 20 --mlp-size 960
                                               a smaller model, with little lost
  fsdfm quantize MODEL DIR --data DATA         a smaller file: weights in few bits
  fsdfm serve --model STUDENT                  an API that OpenAI's clients speak, and a page
  fsdfm bench                                  speed and memory here, beside references

Each command explains its flags: fsdfm COMMAND --help.  fsdfm --version prints the version.
"""


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
    use_utf8(sys.stdout)
    wait_briefly()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except FsdfmError as error:
        print(f"error: {_message(error, words[0] if words else '')}", file=sys.stderr)
        return BAD_INPUT
    except Stopped:
        return INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        discard_stdout()
        return BROKEN_PIPE
    except OSError as error:  # of a name that no file can have, say
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT


def _run(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        importlib.import_module(f"fsdfm.cli.{argv[0]}").run(argv[1:])
    elif argv and argv[0] in ("-h", "--help"):
        write(HELP)
    elif argv and argv[0] == "--version":
        write(f"fsdfm {importlib.metadata.version('fsdfm')}\n")
    else:
        wrong = f"there is no command {argv[0]!r}" if argv else "a command is missing"
        raise ConfigError(f"{wrong}: choose {', '.join(COMMANDS)}, or see fsdfm --help.")
    return 0


def _message(error: FsdfmError, command: str) -> str:
    """One line, in which options are called by their flags."""
    text = " ".join(str(error).split())
    if not error.fields:
        return text
    from fsdfm.cli.flags import spoken

    module = sys.modules.get(f"fsdfm.cli.{command}")
    return spoken(text, error.fields, getattr(module, "POSITIONAL", ()))

"""Which shape an adapted model should have: one factor at a time, at equal CPU time.

    python benchmarks/adapt.py TEXT... --out OUT [--minutes 30] [--cells base layers-8 ...]

Every cell is `fsdfm adapt smollm2` with one choice changed from BASE. How many updates fit into the
minutes is found first, from the CPU time of a few updates (a cell pays for its own head, layers and
optimizer); the learning rate falls to a tenth over exactly these. A row holds the updates, the CPU
minutes they really took, and the bound on the held-out text in bits a byte (benchmarks/bound.py);
rows that OUT/rows.jsonl has already are not made again. `causal` is the autoregressive rival, whose
figure is exact. OUT/table.md is the table. Judge the cells
with `fsdfm evaluate --model OUT/CELL --steps 8 64 --judge gemma3 --judge smollm2`.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

BASE = {
    "--layers": "0,1,2,8,9,10,11,21,24,27,28,29",
    "--vocab-size": "12288",
    "--source": "mask",
    "--shift": "left",
    "--optimizer": "adamw",
    "--learning-rate": "6e-4",
    "--batch-size": "8",
    "--frozen-share": "0.33",
}
"""Its layers, and those of 16 and 20, were missed most where every layer was tried at each turn
(benchmarks/layers.py --looked-at 99, by 1,024 other tokens than it takes now)."""
CELLS: dict[str, dict[str, str]] = {
    "base": {},
    "layers-6": {"--layers": "6"},
    "layers-8": {"--layers": "8"},
    "layers-16": {"--layers": "0,1,2,8,9,10,11,20,21,22,23,24,25,27,28,29"},
    "layers-20": {"--layers": "0,1,2,3,6,7,8,9,10,11,19,20,21,22,23,24,25,27,28,29"},
    "layers-30": {"--layers": "30"},
    "lora-30": {"--layers": "30", "--lora": "16", "--learning-rate": "2e-3"},
    "spread-12": {"--layers": "0,1,2,3,7,10,14,17,21,24,28,29"},
    "spread-20": {"--layers": "0,1,2,3,5,6,8,10,11,13,15,16,18,20,21,23,25,26,28,29"},
    "vocabulary-49152": {"--vocab-size": "49152"},
    "vocabulary-16384": {"--vocab-size": "16384"},
    "vocabulary-8192": {"--vocab-size": "8192"},
    "uniform": {"--source": "uniform"},
    "causal": {"--attention": "causal"},
    "no-shift": {"--shift": "none"},
    "muon": {"--optimizer": "muon", "--batch-size": "32"},
    "adamw-32": {"--batch-size": "32"},
    "rate-3e-4": {"--learning-rate": "3e-4"},
    "rate-1e-3": {"--learning-rate": "1e-3"},
}
CALIBRATION = (2, 8)
"""Updates of two short runs, whose difference in CPU time is that of the updates between."""
EMA_SHARE = 0.03
"""The average's length, as a share of the updates."""


def fsdfm(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "fsdfm", *words], check=True)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def prepared(texts: list[str], out: Path, vocab_size: str) -> Path:
    """The texts in a cut vocabulary, made once."""
    data = out / f"data-{vocab_size}"
    if not data.exists():
        words = ("--tokenizer", "smollm2", "--vocab-size", vocab_size, "--out", str(data))
        fsdfm("prepare", *texts, *words)
    return data


def trained(cell: str, options: dict[str, str], data: Path, run: Path, steps: int) -> float:
    """Train one cell for so many updates; returns its CPU seconds."""
    flags = [word for flag, value in options.items() for word in (flag, value)]
    flags += ["--steps", str(steps), "--warmup-steps", str(min(100, 1 + steps // 10))]
    flags += ["--ema-decay", str(round(1.0 - 1.0 / max(2.0, EMA_SHARE * steps), 5))]
    flags += ["--evaluate-every", str(steps), "--checkpoint-every", str(max(50, steps // 5))]
    flags += ["--sample-every", "0", "--validation-sequences", "8"]
    before = cpu_seconds()
    fsdfm("adapt", "smollm2", "--data", str(data), "--out", str(run), *flags)
    return cpu_seconds() - before


def updates_within(
    seconds: float, cell: str, options: dict[str, str], data: Path, out: Path
) -> int:
    """How many updates of a cell fit into so much CPU time."""
    spent = []
    for steps in CALIBRATION:
        run = out / "calibration"
        shutil.rmtree(run, ignore_errors=True)
        spent.append(trained(cell, options, data, run, steps))
        shutil.rmtree(run)
    few, many = CALIBRATION
    return max(20, int(seconds * (many - few) / max(1e-9, spent[1] - spent[0])))


def bound(run: Path, data: Path) -> dict[str, float]:
    if (run / "adapter.json").exists():
        whole = run.with_name(f"{run.name}-merged")
        fsdfm("merge", str(run / "base"), str(run), str(whole))
        run = whole
    command = [sys.executable, str(Path(__file__).with_name("bound.py")), str(run)]
    command += ["--text", str(data)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row: dict[str, float] = json.loads(printed)
    return row


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| cell | changed | updates | tokens, M | CPU minutes | bits a byte | 95 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        changed = " ".join(f"{k} {v}" for k, v in CELLS[str(row["cell"])].items()) or "-"
        lines.append(
            f"| {row['cell']} | {changed} | {row['updates']} | {row['tokens_millions']} "
            f"| {row['cpu_minutes']} | {row['bits_per_byte']} | ± {row['interval']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", help="what fsdfm prepare reads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0, help="CPU minutes a cell, each core")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "rows.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for cell in args.cells:
        if any(row["cell"] == cell for row in rows):
            continue
        options = {**BASE, **CELLS[cell]}
        data = prepared(args.texts, args.out, options.pop("--vocab-size"))
        seconds = 60.0 * args.minutes * args.threads
        steps = updates_within(seconds, cell, options, data, args.out)
        spent = trained(cell, options, data, args.out / cell, steps)
        judged = bound(args.out / cell, data)
        tokens = steps * int(options["--batch-size"]) * 256
        rows.append(
            {
                "cell": cell,
                "updates": steps,
                "tokens_millions": round(tokens / 1e6, 2),
                "cpu_minutes": round(spent / 60.0, 1),
                "bits_per_byte": judged["bits_per_byte"],
                "interval": judged["interval"],
            }
        )
        with log.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(rows[-1]), flush=True)
    (args.out / "table.md").write_text(table(rows))


if __name__ == "__main__":
    main()

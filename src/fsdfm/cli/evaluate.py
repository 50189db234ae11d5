"""`fsdfm evaluate`: judge the texts of models, at several budgets."""

from __future__ import annotations

from collections.abc import Sequence

from fsdfm.cli.console import note, work, write
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.files import write_whole
from fsdfm.core.registry import Names
from fsdfm.eval.settings import JudgeSettings

ABOUT = """\
Judge the texts of one or more models at several budgets.

Writes report.md, report.json and plots. What is done is kept in OUT/parts, so a command that was
interrupted goes on where it stopped. Under torchrun samples are spread over the processes."""


def run(argv: Sequence[str]) -> None:
    """Judge models; a bar on a terminal, a line for every row elsewhere."""
    (given,) = parse(
        "evaluate",
        ABOUT,
        argv,
        Flags(
            of=JudgeSettings,
            repeated=("model", "judge", "reference"),
            choices={
                "step": Names("fsdfm.flow.step.STEP_RULES"),
                "grid": Names("fsdfm.flow.grid.GRIDS"),
                "precision": Names("fsdfm.generate.precision.PRECISIONS"),
            },
        ),
    )
    args = JudgeSettings(**given)
    from fsdfm.eval import evaluation, plots
    from fsdfm.eval.tables import markdown, section
    from fsdfm.generate.source import load_source

    plots.check()
    try:
        with work("Loading models and judge") as progress:
            report = evaluation.evaluate(args, load_source, progress)
    except KeyboardInterrupt:
        note(f"What is done is kept in {args.out}: run the same command again to go on.")
        raise
    if report is None:
        return
    text = markdown(report)
    files = plots.plot(report, args.out)
    if files:
        text += "\n## Plots\n\n" + "".join(f"![{file.stem}]({file.name})\n" for file in files)
    write_whole(args.out / "report.md", text)
    for task in report.tasks():
        write(f"{task}\n\n")
        write("\n".join(section(report, task)) + "\n\n")
    note(f"Written: {args.out / 'report.md'}, report.json" + ", plots" * bool(files))

"""`fsdfm plan`: what a training takes, before it is begun."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fsdfm.cli.console import write
from fsdfm.cli.flags import Flags, parse
from fsdfm.recipes.plan_settings import PlanSettings

if TYPE_CHECKING:
    from fsdfm.recipes.plan import Forecast, Scale

ABOUT = """\
Say what a training by the published recipe takes: memory, FLOPs, days, and more devices on paper.

Nothing is measured: figures follow from formulas, times from rates that you can give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """How it is shown."""

    json: bool = False
    """Print one JSON object."""


def run(argv: Sequence[str]) -> None:
    """Print the plan."""
    given, own = parse("plan", ABOUT, argv, Flags(of=PlanSettings), Flags(of=_Own))
    settings = PlanSettings(**given)
    from fsdfm.recipes.plan import forecast

    found = forecast(settings)
    if _Own(**own).json:
        write(json.dumps(found.to_dict()) + "\n")
    else:
        write("\n".join(_lines(found)) + "\n")


def _lines(plan: Forecast) -> Iterator[str]:
    settings, state = plan.settings, plan.state
    tokens = plan.batch_size * settings.context_length
    yield f"{settings.task} {settings.preset}: {state.parameters:,} parameters"
    yield ""
    yield f"Update            {plan.batch_size:,} sequences, {tokens:,} tokens"
    yield f"  of a device     {_passes(plan)}"
    yield f"FLOPs a token     {plan.flops_a_token / 1e9:,.3f} G"
    yield f"Tokens            {plan.tokens / 1e9:,.1f} G, {plan.updates:,.0f} updates"
    yield ""
    yield f"Memory a device   GB ({settings.gpus} devices, sharding {settings.sharding})"
    for name, count in asdict(plan.memory).items():
        yield f"  {name:<14}{count / 1e9:>8.2f}"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield (
        f"  {'in all':<14}{plan.memory.total / 1e9:>8.2f}  {verdict} in "
        f"{settings.gpu_memory_gb:g} GB"
    )
    yield ""
    yield "Devices  sequences  seconds   computing          days   GB sent by a device"
    yield "         an update  an update share of time            in node  to others"
    for scale in plan.scales:
        yield _row(scale)
    yield ""
    yield (
        f"Assumed: {settings.peak_tflops:g} TFLOP/s at {settings.utilisation:.0%}, "
        f"{settings.link_gb:g} GB/s within a node of {settings.gpus_per_node}, "
        f"{settings.network_gb:g} GB/s between nodes."
    )
    yield (
        "Shares and days: sums of gradients after the backward pass - during it. Data, validation,"
    )
    yield "checkpoints and restarts are left out. Never fewer sequences than devices."


def _passes(plan: Forecast) -> str:
    """How a device goes through its sequences, and the flags that say so."""
    text = f"{plan.passes} pass{'es' * (plan.passes > 1)} of {plan.sequences} sequence"
    text += "s" * (plan.sequences > 1)
    whole = plan.sequences * plan.settings.gpus
    if whole * plan.passes == plan.batch_size:
        text += f" (--batch-size {whole} --accumulate {plan.passes})"
    return text


def _row(scale: Scale) -> str:
    seconds = scale.compute_seconds + scale.communication_seconds
    share = f"{scale.efficiency:.0%} - {scale.efficiency_hidden:.0%}"
    days = f"{scale.days:.2f} - {scale.days_hidden:.2f}"
    return (
        f"{scale.gpus:>7,}  {scale.batch_size:>9,}  {seconds:>9.3f} {share:>13} {days:>13}"
        f"  {scale.bytes_inside / 1e9:>8.2f}  {scale.bytes_outside / 1e9:>9.2f}"
    )

"""Do the tests see a fault? Faults are put in, one at a time, and tests named that must fail.

    python benchmarks/mutations.py [--only NUMBER...]

Each fault is one line of flow/ or model/ that is changed in a copy of src/; the tests run against
the copy. A fault is caught if a test fails, not if nothing can be imported. First, all of the tests
named are run against a copy without a fault. The exit code is 1 if anything was missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAILED = 1
"""Exit code of pytest where tests ran and some failed."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One line that is wrong."""

    file: str
    """In src/fsdfm."""
    right: str
    wrong: str
    tests: str
    """File of the tests that must see it, and what their names begin with."""


FAULTS = (
    Fault(
        "flow/step.py",
        "hazard = -torch.log1p(-a[:, None])",
        "hazard = a[:, None]",
        "test_step.py::test_published_step_leaves_with_its_own_probability",
    ),
    Fault(
        "flow/step.py",
        "offset < expected.frac()",
        "offset > expected.frac()",
        "test_step.py::test_movers_give_every_position_the_same_marginal_chance",
    ),
    Fault(
        "flow/target.py",
        "((1 - k_s) * (k_u - k_t)",
        "((1 - k_s) * (k_s - k_u)",
        "test_target.py::test_semigroup",
    ),
    Fault(
        "flow/target.py",
        "self.open = self.open & ~movers",
        "pass",
        "test_absorbing.py::test_jumps_inside_a_target_move_hidden_positions_alone",
    ),
    Fault(
        "flow/posterior.py",
        "known = known.index_fill(0, at, True)",
        "known = known.clone()",
        "test_joint.py::test_one_call_that_draws_in_two_groups_gets_a_joint_law_right",
    ),
    Fault(
        "flow/loss.py",
        "schedule, weight=2.0 * left)",
        "schedule, weight=left)",
        "test_loss.py::test_elbo_of_a_wrong_posterior_is_the_cross_entropy_from_masks",
    ),
    Fault(
        "model/rotary.py",
        "torch.cat((-sin[:, :half], sin[:, half:])",
        "torch.cat((sin[:, :half], sin[:, half:])",
        "test_transformer.py::test_rotary_scores_depend_on_the_distance_alone",
    ),
    Fault(
        "model/joint.py",
        "known.flatten()[index] & inside",
        "known.flatten()[index]",
        "test_joint.py::test_a_neighbourhood_is_what_lies_on_both_sides",
    ),
    Fault(
        "model/causal.py",
        "F.pad(x_t, (1, 0), value=start)",
        "F.pad(x_t, (0, 1), value=start)",
        "test_causal.py::test_every_row_sees_every_token",
    ),
    Fault(
        "model/engine.py",
        "return x + y if gate is None else torch.addcmul(x, gate, y)",
        "return x + y",
        "test_engine.py::test_hidden_rows_are_the_networks",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="faults, from 1")
    chosen = parser.parse_args().only or range(1, len(FAULTS) + 1)
    faults = [FAULTS[number - 1] for number in chosen]
    if code := tried(None, [fault.tests for fault in faults]):
        print(f"The tests do not pass without a fault (pytest's exit code: {code}).")
        return 1
    missed = 0
    for number, fault in zip(chosen, faults, strict=True):
        code = tried(fault, [fault.tests])
        verdict = {0: "MISSED", FAILED: "caught"}.get(code, f"BROKEN (exit code {code})")
        missed += code != FAILED
        print(f"{number:2} {verdict}  {fault.file}: {fault.wrong}  [{fault.tests}]", flush=True)
    print(f"{len(faults) - missed} of {len(faults)} faults caught")
    return int(missed > 0)


def tried(fault: Fault | None, tests: list[str]) -> int:
    """Exit code of pytest over tests, against a copy of the package with a fault."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        if fault is not None:
            path = copy / "fsdfm" / fault.file
            text = path.read_text()
            if text.count(fault.right) != 1:
                raise SystemExit(f"{fault.file} no longer has one line with: {fault.right}")
            path.write_text(text.replace(fault.right, fault.wrong))
        files = sorted({str(ROOT / "tests" / test.partition("::")[0]) for test in tests})
        names = " or ".join(test.partition("::")[2] for test in tests)
        command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider"]
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [*command, *files, "-k", names], cwd=ROOT, env=environment, capture_output=True
        )
        return done.returncode


if __name__ == "__main__":
    sys.exit(main())

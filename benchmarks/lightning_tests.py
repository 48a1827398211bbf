"""Lightning's own tests, twice: as they are, and with our callbacks in every Trainer. Prints the tests whose outcome differs.

    git clone --branch 2.6.5 https://github.com/Lightning-AI/pytorch-lightning /tmp/lightning
    python benchmarks/lightning_tests.py /tmp/lightning

The file is its own pytest plugin. Tests run one after the other, in one process for each of the two.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDERS = {
    "callbacks": "callback_hook_outputs callbacks early_stopping finetuning_callback gradient_accumulation_scheduler "
    "stochastic_weight_avg timer",
    "models": "hooks",
    "loops": "training_loop training_epoch_loop loops training_loop_flow_dict training_loop_flow_scalar",
    "loops/optimization": "automatic_loop closure manual_loop",
    "trainer/optimization": "backward_calls manual_optimization multiple_optimizers optimizers",
}
TESTS = [f"{folder}/test_{name}.py" for folder, names in FOLDERS.items() for name in names.split()]
OUTCOMES, WITH_OURS = "NORMKIT_OUTCOMES", "NORMKIT_WITH_OURS"


def pytest_configure(config: Any) -> None:
    """Our callbacks into every Trainer, where asked for."""
    if not os.environ.get(WITH_OURS):
        return
    from lightning.pytorch import Trainer

    from pl_normkit.callbacks import GammaDecay, ModelAudit, NaNGuard

    original = Trainer.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not getattr(self, "barebones", False):
            connector = self._callback_connector
            self.callbacks = connector._reorder_callbacks([NaNGuard(), ModelAudit(config=False), GammaDecay(), *self.callbacks])

    Trainer.__init__ = init  # type: ignore[method-assign]


def pytest_runtest_logreport(report: Any) -> None:
    """One line a test: what became of it, and the last line of its error."""
    path = os.environ.get(OUTCOMES)
    if path and (report.when == "call" or report.outcome != "passed"):
        error = str(report.longrepr).strip().splitlines()[-1:] if report.failed else []
        with Path(path).open("a") as file:
            file.write(json.dumps([report.nodeid, report.outcome, *error]) + "\n")


def outcomes(checkout: Path, tests: list[str], *, ours: bool) -> dict[str, list[str]]:
    """Test -> what became of it."""
    path = Path(tempfile.mkdtemp()) / "outcomes"
    here = Path(__file__).resolve()
    paths = [str(here.parent), str(here.parents[1]), str(checkout / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), OUTCOMES: str(path), WITH_OURS: "1" if ours else ""}
    options = [
        "-q",
        "--no-header",
        "--tb=line",
        "-p",
        here.stem,
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--continue-on-collection-errors",
    ]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests_pytorch/{test}" for test in tests)]
    done = subprocess.run(command, cwd=checkout / "tests", env=environment, check=False, capture_output=True, text=True)
    if not path.exists():
        sys.exit(f"no test ran:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {name: found for name, *found in map(json.loads, path.read_text().splitlines())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("tests", nargs="*", default=TESTS, help="paths below tests/tests_pytorch")
    arguments = parser.parse_args()
    plain, ours = (outcomes(arguments.checkout.resolve(), list(arguments.tests), ours=ours) for ours in (False, True))
    changed = {name: (before, ours.get(name, ["not run"])) for name, before in plain.items() if before[0] != ours.get(name, ["not run"])[0]}
    for name, (before, after) in changed.items():
        print(f"{name}: {before[0]} -> {' '.join(after)}"[:400])
    passed = sum(found[0] == "passed" for found in plain.values())
    print(f"{len(plain)} tests, {passed} passed without our callbacks; {len(changed)} outcomes differ with them")


if __name__ == "__main__":
    main()

"""`pl-normkit compare RECIPE --with CALLBACKS`: what a change does to a training, from runs that share everything else."""

from __future__ import annotations

__all__ = ["compare"]

from collections.abc import Generator, Iterable, Sequence
from functools import partial

from rich.console import Console
from rich.progress import Progress

from pl_normkit.errors import NormkitError
from pl_normkit.jobs import Failure, open_workers, run_jobs
from pl_normkit.output import say
from pl_normkit.recipes.comparison_plan import Plan, read_plan
from pl_normkit.recipes.comparison_report import Comparison
from pl_normkit.recipes.paired_runs import PairedRun, RunStore
from pl_normkit.recipes.trial import Key, quiet_lightning, train_arms, train_here


def compare(target: str, args: Sequence[str]) -> int:
    """Train all runs that the words ask for, print and draw what they say.

    Runs that the output folder already holds, from the same command, are not trained again.

    Args:
        target: name of a recipe, or `package.module:function` that builds a module and its data.
        args: what stands after it.

    Returns 0, or another code where a signal ended a run. Raises NormkitError for bad input, and where runs came to no end.
    """
    try:
        plan = read_plan(target, args)
    except SystemExit as stop:  # --help, or an option of ours that argparse has refused
        return int(stop.code or 0)
    store, console = RunStore(plan.folder, plan.settings), Console()
    train = train_here(plan.train, plan.arms, plan.metrics) if plan.on == "here" else partial(_train_elsewhere, plan, target, args)
    code = train_arms(train, plan.arms, plan.seeds, plan.metrics, store, console)
    if code is not None:
        return code
    comparison = Comparison(store.runs, list(plan.arms), plan.seeds, plan.metrics)
    comparison.print(console)
    console.print(f"runs:       {plan.folder / 'runs.csv'}", soft_wrap=True, highlight=False)
    picture = plan.folder / "comparison.png"
    drawn = comparison.draw(picture)
    console.print(f"picture:    {picture if drawn else 'none, matplotlib is not installed'}", soft_wrap=True, highlight=False)
    return 0


def _train_elsewhere(
    plan: Plan, target: str, args: Sequence[str], keys: Iterable[Key], progress: Progress
) -> Generator[tuple[Key, PairedRun | int], None, None]:
    """Each run in a process of its own, or on a node: it reads the same words again, since a plan cannot be sent."""
    lost = []
    task = progress.add_task(f"trained on {plan.on}", total=None)
    work, imports = partial(_train_one, target, list(args)), ["pl_normkit.recipes.comparing"]
    with open_workers(plan.on, work, at_once=plan.jobs, is_heavy=True, imports=imports) as workers:
        for key, result in run_jobs(workers, keys):
            if isinstance(result, Failure) and result.error is not None:
                raise result.error
            if isinstance(result, Failure) and not result.is_lost:
                say(result.trace or result.text)
                raise NormkitError("a run failed", where=_name(key), evidence=result.text)
            if isinstance(result, PairedRun):
                yield key, result
            else:
                lost.append(f"{_name(key)}: {result.text if isinstance(result, Failure) else f'it was ended (exit code {result})'}")
    progress.remove_task(task)
    if lost:
        evidence = "; ".join(lost)
        raise NormkitError(
            f"{len(lost)} of the runs came to no end", where=str(plan.folder), evidence=evidence, fix="the same command goes on with them"
        )


def _name(key: Key) -> str:
    return f"seed {key[0]} {key[1]}"


def _train_one(target: str, args: Sequence[str], key: Key) -> PairedRun | int:
    plan = read_plan(target, args)
    with quiet_lightning(), Progress(disable=True) as progress:
        ((_, result),) = train_here(plan.train, plan.arms, plan.metrics)([key], progress)
    return result

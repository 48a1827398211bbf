"""NK005 to NK008: modules in the wrong mode, and norms with nothing to normalize."""

from __future__ import annotations

__all__ = ["dropout_active_in_evaluation", "eval_run", "module_in_eval_mode", "norm_of_one_value", "statistics_of_frozen_norm"]

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader

from pl_normkit.findings import Evidence, FixSafety, Place
from pl_normkit.first_step import NormCall, StepFacts
from pl_normkit.methods.wiring.fix import keep_norms_in_eval
from pl_normkit.methods.wiring.measure import EvalRun, measure_eval_run
from pl_normkit.methods.wiring.unlearned import has_trained_twin
from pl_normkit.rules import Mark, Needs, Observation, Subject, rule

SOURCE = "derived here from how torch's modules follow train() and eval(); tests/methods/wiring"
_STEP = (Needs.MODEL, Needs.STEP)


def eval_run(subject: Subject) -> EvalRun:
    """The model's forward in eval mode on the step's inputs; empty where it must not or cannot run."""
    step = subject.step
    if subject.model is None or subject.example_inputs is None or step is None or not subject.measure:
        return EvalRun()
    used = None if step.forward is None else step.forward.inputs_used
    return measure_eval_run(subject.model, subject.example_inputs, used)


@rule("NK005", "module-in-eval-mode", mark=Mark.DERIVED, source=SOURCE, needs=_STEP)
def module_in_eval_mode(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds parts of the model that train while they are in eval mode although they hold dropouts or batch norms, and the reverse in an
    evaluation step (seen by `ModelAudit` in the first validation batch, and by `EvaluationRecorder`).

    Silent where most of the part is frozen, and where only the norms themselves were put into eval mode: both are done on purpose.

    Why it hurts
    Dropout does nothing and batch norms use old statistics, so a run without the regularisation that its code shows. Models from
    `from_pretrained` arrive in eval mode; a validation written by hand leaves it behind.

    Evidence
    How many dropouts and norms are off.

    Example
    ```python
    from torch import nn

    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 2)).eval()  # and then trained
    ```

    Use instead
    ```python
    net.train()
    ```

    Fix and its safety
    Advice only: where to call train() is the loop's to say.

    Source
    Derived here from how torch's modules follow train() and eval(). Tested in tests/methods/wiring/test_rules.py.
    """
    step, model = subject.step, subject.model
    assert step is not None
    assert model is not None
    functional = step.forward.silent_dropouts if step.forward is not None else ()
    paths = list(dict.fromkeys((*step.in_eval_mode, *(path for path in functional if not model.get_submodule(path).training))))
    parts = dict.fromkeys(part for path in paths if (part := _part_in_eval(model, path)) is not None)
    trained = [part for part in parts if _is_mostly_trained(model.get_submodule(part), part, step)]
    if trained:
        count = sum(any(path == part or path.startswith(f"{part}.") or not part for part in trained) for path in paths)
        yield Observation(
            "trains in eval mode: its dropouts and norms are off",
            [Place(part) for part in trained],
            "call train() before training steps; freeze the part with requires_grad_(False) if it must not learn",
            (Evidence("dropouts and norms in eval mode", count, "0", is_measured=False),),
            cause="training",
        )
    if step.in_train_mode:
        yield Observation(
            "evaluates in training mode: its dropouts and norms are on",
            [Place(path) for path in step.in_train_mode],
            "call eval() before the evaluation, and train() after it",
            cause="evaluation",
        )


def _part_in_eval(model: nn.Module, path: str) -> str | None:
    """The outermost part in eval mode around a module; None where it is a single norm or dropout."""
    names = path.split(".") if path else []
    for depth in range(len(names)):
        part = ".".join(names[:depth])
        if not model.get_submodule(part).training:
            return part
    return None if isinstance(model.get_submodule(path), (_NormBase, _DropoutNd)) else path


def _is_mostly_trained(part: nn.Module, path: str, step: StepFacts) -> bool:
    prefix = f"{path}." if path else ""
    sizes = {name: p.numel() for name, p in part.named_parameters()}
    trained = sum(size for name, size in sizes.items() if step.gradients.get(prefix + name) is not None)
    return 2 * trained > sum(sizes.values())


@rule("NK006", "dropout-active-in-evaluation", mark=Mark.DERIVED, source=SOURCE, needs=_STEP)
def dropout_active_in_evaluation(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds dropout that still drops when the model is in eval mode: `F.dropout(x, p)` without `training=self.training`,
    `scaled_dot_product_attention(..., dropout_p=p)`, a dropout kept in training mode; and stochastic depth decided by a number of Python,
    numpy or torch (`if random.random() < p: return x`) without a look at `self.training`.

    `ModelAudit` sees dropout in the first validation batch, the sanity check's included; `audit()` runs the model in eval mode. Layers
    left out by a random number show only where two runs are compared: in `audit()` and `ModelAudit(measure=True)`. A choice between two
    layers, teacher forcing, noise and sampled latents are not taken for dropout.

    Monte Carlo dropout means it: say so with `per_module_ignore={"path.of.the.module": ["NK006"]}`.

    Why it hurts
    Predictions are random, validation is worse than the model is, and two evaluations disagree.

    Evidence
    The drop probability.

    Example
    ```python
    import torch.nn.functional as F

    def forward(self, x):
        return self.last(F.dropout(self.first(x), 0.2))
    ```

    Use instead
    ```python
    def forward(self, x):
        return self.last(F.dropout(self.first(x), 0.2, self.training))
    ```

    Fix and its safety
    Advice only: the call stands in forward.

    Source
    Derived here: the defaults of `torch.nn.functional`. Tested in tests/methods/wiring/test_rules.py.
    """
    step = subject.step
    seen = (step.evaluation_dropouts if step is not None else ()) or subject.once(eval_run).dropouts
    if seen:
        yield Observation(
            "dropout is active in eval mode: predictions are random",
            list(dict.fromkeys(dropout.place for dropout in seen)),
            "pass training=self.training (dropout_p=p if self.training else 0.0 for attention), or use nn.Dropout; "
            "if Monte Carlo dropout is meant, ignore this rule at the module",
            (Evidence("drop probability", max(dropout.probability for dropout in seen), "0 in eval mode"),),
        )
    elif left_out := subject.once(eval_run).left_out:
        yield Observation(
            "random numbers leave layers out in eval mode: predictions are random",
            list(left_out),
            "leave layers out in training alone: if self.training and random.random() < p",
            (Evidence("places whose parameters count in one of two runs alone", len(left_out), "0"),),
        )


@rule(
    "NK007",
    "statistics-of-frozen-norm",
    mark=Mark.DERIVED,
    source=SOURCE,
    needs=_STEP,
    fix=keep_norms_in_eval,
    fix_safety=FixSafety.SAFE,
)
def statistics_of_frozen_norm(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds batch norms in training mode whose parameters are frozen and that have nothing trained before them: their running statistics
    still move.

    Silent for teachers and target networks beside a trained network of the same shape, and where adapters are trained before the norm.

    Why it hurts
    The part that should stay as it was gives other features in every step and, with the moved statistics, in evaluation.

    Evidence
    How many norms there are.

    Example
    ```python
    from torch import nn

    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).requires_grad_(False)
    encoder.train()  # as Lightning and every loop do
    ```

    Use instead
    ```python
    from pl_normkit.methods.wiring import keep_norms_in_eval

    keep_norms_in_eval(encoder)
    ```

    Fix and its safety
    Safe: `keep_norms_in_eval` puts these norms into eval mode and keeps them there over train(); the eval forward is the same.

    Source
    Derived here from how batch norm works in torch. Tested in tests/methods/wiring/test_rules.py and test_fix.py.
    """
    step, model = subject.step, subject.model
    assert step is not None
    assert model is not None
    calls = step.forward.norms if step.forward is not None else ()
    modules = dict(model.named_modules())
    places = {
        call.place.module: call.place
        for call in calls
        if call.kind == "batch" and call.is_training and not call.input_has_gradient and _is_frozen_norm(modules.get(call.place.module))
    }
    places = {path: place for path, place in places.items() if not has_trained_twin(model, f"{path}.weight", step.gradients)}
    if places:
        yield Observation(
            "the part is frozen, but its batch norms still move their running statistics",
            list(places.values()),
            "put these norms into eval mode and keep them there: pl_normkit.methods.wiring.keep_norms_in_eval(model)",
            (Evidence("batch norms that move", len(places), "0"),),
        )


def _is_frozen_norm(module: nn.Module | None) -> bool:
    if not isinstance(module, _BatchNorm) or module.running_mean is None:
        return False
    own = list(module.parameters())
    return bool(own) and not any(parameter.requires_grad for parameter in own)


@rule("NK008", "norm-of-one-value", mark=Mark.DERIVED, source=SOURCE, needs=_STEP)
def norm_of_one_value(subject: Subject) -> Iterator[Observation]:
    """What it does
    Finds a batch norm that gets one value per channel from one sample (after global pooling, in an MLP) where the loader can give a
    batch of one, or where the step had two values at most; and layer, group and instance norms over a single value.

    Why it hurts
    A single value minus its mean is 0: torch raises an error for batch norm, in the last batch of an epoch often, and the other norms
    return their bias for every input. Of two values only the sign is left.

    Evidence
    The values per statistic in this step.

    Example
    ```python
    from torch import nn

    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))  # with batches of 1 or 2
    ```

    Use instead
    ```python
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8))  # or drop_last=True and larger batches
    ```

    Fix and its safety
    Advice only: another norm has other weights.

    Source
    Derived here from the definition of the norms. Tested in tests/methods/wiring/test_rules.py.
    """
    step = subject.step
    assert step is not None
    smallest = _smallest_batch(subject.loaders.train if subject.loaders is not None else None)
    calls = step.forward.norms if step.forward is not None else ()
    seen = {call.place.module: call for call in calls if call.is_training and _has_one_value(call, smallest)}
    for is_batch in (True, False):
        found = [call for call in seen.values() if (call.kind == "batch") is is_batch]
        if found:
            yield Observation(
                "a batch of one leaves one value to normalize" if is_batch else "the norm runs over a single value and returns its bias",
                [call.place for call in found],
                "set drop_last=True and use larger batches, or a norm that does not need the batch"
                if is_batch
                else "take the norm out, or let it run over more values",
                (Evidence("values per statistic in this step", min(call.values for call in found), "many"),),
                cause="batch" if is_batch else "sample",
            )


def _has_one_value(call: NormCall, smallest_batch: int | None) -> bool:
    if call.values_per_sample != 1:
        return False
    if call.kind != "batch":
        return True
    return call.values <= 2 if smallest_batch is None else smallest_batch == 1


def _smallest_batch(loader: Any) -> int | None:
    """The size of the smallest batch that the loader gives, None where that cannot be told."""
    if isinstance(loader, Mapping):
        loader = next(iter(loader.values()), None)
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return None
    try:
        samples = len(loader.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    rest = samples % loader.batch_size
    return loader.batch_size if loader.drop_last or rest == 0 else rest

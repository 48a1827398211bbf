"""One output of each message for docs/wiring.md; printed by `python -m tests.methods.wiring.outputs`, which names no machine's paths."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from pl_normkit.auditing import audit_subject
from pl_normkit.first_step import EvaluationRecorder, StepFacts, StepRecorder, read_step
from pl_normkit.report import Report
from pl_normkit.rules import Subject
from pl_normkit.selection import Selection
from tests.methods.wiring import chance  # noqa: F401
from tests.methods.wiring.mistakes import MISTAKES
from tests.methods.wiring.setups import Setup, classes, cnn, cross_entropy, mlp


def judged(model: nn.Module, step: StepFacts | None, code: str) -> Report:
    return audit_subject(Subject(model=model, loss=torch.zeros(()), step=step), Selection([code]))


def all_gradients_needed_by_ddp() -> Report:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "later": nn.Linear(4, 4)})
    step = read_step(model, None, model["used"](torch.randn(2, 4)).sum())
    assert step is not None
    return judged(model, replace(step, needs_all_gradients=True), "NK001")


def gradients_that_nobody_clears() -> Report:
    model, x, y = mlp(), torch.randn(16, 32), classes(16)
    optimizer = SGD(model.parameters(), 0.1)
    recorder = StepRecorder(model, [optimizer])
    for _ in range(2):
        with recorder.forward():
            loss = F.cross_entropy(model(x), y)
        recorder.before_backward(loss)
        loss.backward()
        recorder.after_backward()
        optimizer.step()
    return judged(model, recorder.late_facts(), "NK004")


def evaluation_in_training_mode() -> Report:
    model = cnn()
    recorder = EvaluationRecorder(model)
    recorder.start()
    model(torch.randn(4, 3, 8, 8))
    recorder.stop()
    return judged(model, recorder.facts, "NK005")


def preview(code: str, setup: Setup) -> Report:
    setup.select = [code]
    return setup.report()


def confident_start() -> Report:
    model = nn.Linear(32, 10)
    with torch.no_grad():
        model.weight *= 60
    return preview("NK014", Setup(model, torch.randn(64, 32), cross_entropy(classes(64))))


def targets_far_away() -> Report:
    target = torch.randn(64, 1) + 30
    return preview("NK014", Setup(nn.Linear(32, 1), torch.randn(64, 32), lambda output: F.mse_loss(output, target)))


def bias_before_a_norm() -> Report:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return preview("NK015", Setup(net, torch.randn(8, 3, 16, 16), cross_entropy(classes(8))))


def last_step_of_a_reverse_direction() -> Report:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(8, 16, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.rnn(x)[0]
            return output[:, -1]

    return preview("NK016", Setup(Net(), torch.randn(5, 6, 8), lambda output: output.square().mean()))


def cut_in_the_training_step() -> Report:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(32, 16), nn.Linear(16, 10)

        def training_step(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.encoder(x).detach()), y)

    model = Net()
    recorder = StepRecorder(model)
    with recorder.forward():
        loss = model.training_step(torch.randn(16, 32), classes(16))
    recorder.before_backward(loss)
    loss.backward()
    recorder.after_backward()
    return judged(model, recorder.facts, "NK001")


OF_A_LOOP: dict[str, Callable[[], Report]] = {
    build.__name__: build
    for build in (
        all_gradients_needed_by_ddp, cut_in_the_training_step, gradients_that_nobody_clears, evaluation_in_training_mode, confident_start,
        targets_far_away, bias_before_a_norm, last_step_of_a_reverse_direction,
    )
}  # fmt: skip
"""Set-ups that need a loop, a wrapper or a preview."""
SHOWN = [
    "parameter_never_read",
    "slice_of_the_blocks",
    "data_of_the_features",
    "encoder_under_no_grad",
    "cut_in_the_training_step",
    "loss_made_anew",
    "result_thrown_away",
    "custom_function_without_the_weights_gradient",
    "all_gradients_needed_by_ddp",
    "dead_convolution",
    "saturated_sigmoid",
    "rounded_features",
    "softmax_over_one_score",
    "mask_of_zeros",
    "learning_rate_zero_in_one_group",
    "optimizer_of_a_copy",
    "gradients_that_nobody_clears",
    "trained_in_eval_mode",
    "evaluation_in_training_mode",
    "attention_dropout_always",
    "left_out_by_python",
    "frozen_backbone_in_training_mode",
    "last_batch_of_one",
    "layer_norm_of_one_feature",
    "softmax_before_segmentation_loss",
    "log_softmax_before_cross_entropy",
    "softmax_before_nll",
    "kl_div_with_scores_as_target",
    "kl_div_with_logarithms_as_target",
    "kl_div_with_log_target_of_probabilities",
    "mse_loss_of_column_and_row",
    "lstm_without_batch_first",
    "batch_first_and_transposed",
    "view_after_permute",
    "view_in_the_place_of_a_transpose",
    "softmax_over_the_batch",
    "layer_norm_over_the_batch",
    "cell_stepped_over_the_batch",
    "attention_by_hand_over_the_batch",
    "lengths_never_read",
    "bytes_cast_to_float_inside",
    "codes_as_numbers",
    "features_far_from_zero",
    "a_year_among_the_features",
    "confident_start",
    "targets_far_away",
    "bias_before_a_norm",
    "last_step_of_a_reverse_direction",
]


def output(name: str) -> str:
    """What is said of one set-up; lines of files, which move, without their numbers."""
    torch.manual_seed(0)
    report = OF_A_LOOP[name]() if name in OF_A_LOOP else MISTAKES[name][1]().report()
    (finding,) = report.findings
    places = list(dict.fromkeys(re.sub(r" *:\d+", "", str(place)) for place in finding.places))
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    message = re.sub(r"\.py:\d+", ".py", finding.message)
    at = f"    at {', '.join(places[:3])}{more}\n" if places[0] else ""
    return f"{finding.code} {finding.name}: {message}\n{at}    do {finding.advice}\n"


if __name__ == "__main__":
    print("\n".join(map(output, SHOWN)))

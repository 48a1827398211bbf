"""Set-ups with one mistake each, and the rule that names it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from pl_normkit import Loaders
from tests.methods.wiring.setups import Setup, classes, cnn, cross_entropy, mlp

MISTAKES: dict[str, tuple[str, Callable[[], Setup]]] = {}


def names(rule: str) -> Callable[[Callable[[], Setup]], Callable[[], Setup]]:
    def register(build: Callable[[], Setup]) -> Callable[[], Setup]:
        MISTAKES[build.__name__] = (rule, build)
        return build

    return register


class TwoLayers(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 10)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.relu(self.first(x))))


def two_layers(between: Callable[[TwoLayers, Tensor], Tensor]) -> Setup:
    net = type("Net", (TwoLayers,), {"between": between})()
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@names("parameter-without-gradient")
def parameter_never_read() -> Setup:
    class Net(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64))

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("parameter-without-gradient")
def list_of_layers_never_read() -> Setup:
    class Net(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.middle = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("parameter-without-gradient")
def data_of_the_features() -> Setup:
    return two_layers(lambda self, x: x.data)


@names("parameter-without-gradient")
def encoder_under_no_grad() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = mlp(out=16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.encoder(x)
            return self.head(features)

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("parameter-without-gradient")
def argmax_between() -> Setup:
    return two_layers(lambda self, x: F.one_hot(x.argmax(-1), 64).float())


@names("parameter-without-gradient")
def scale_as_a_number() -> Setup:
    class Net(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def between(self, x: Tensor) -> Tensor:
            return x * self.scale.item()

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("parameter-without-gradient")
def result_thrown_away() -> Setup:
    class Net(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(64)

        def between(self, x: Tensor) -> Tensor:
            self.norm(x)
            return x

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("gradient-always-zero")
def dead_convolution() -> Setup:
    net = cnn()
    nn.init.constant_(net[1].bias, -20.0)
    return Setup(net, torch.randn(8, 3, 16, 16), cross_entropy(classes(8)))


@names("gradient-always-zero")
def saturated_sigmoid() -> Setup:
    net = nn.Sequential(nn.Linear(32, 64), nn.Sigmoid(), nn.Linear(64, 10))
    nn.init.constant_(net[0].bias, 200.0)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@names("gradient-always-zero")
def saturated_tanh_in_a_block() -> Setup:
    net = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 10))
    nn.init.constant_(net[0].weight, 1.0)
    return Setup(net, torch.rand(16, 32) + 1, cross_entropy(classes(16)))


@names("gradient-always-zero")
def rounded_features() -> Setup:
    return two_layers(lambda self, x: torch.round(x))


@names("gradient-always-zero")
def softmax_over_one_score() -> Setup:
    net = nn.Sequential(nn.Linear(32, 1), nn.Softmax(dim=1))
    target = torch.rand(16, 1).round()
    return Setup(net, torch.randn(16, 32), lambda output: F.mse_loss(output, target))


@names("gradient-always-zero")
def mask_of_zeros() -> Setup:
    class Net(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.zeros(64))

        def between(self, x: Tensor) -> Tensor:
            return x * self.get_buffer("mask")

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("parameter-not-updated")
def learning_rate_zero_in_one_group() -> Setup:
    net = mlp()
    groups = [{"params": net[0].parameters(), "lr": 0.0}, {"params": net[2].parameters()}]
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)), [AdamW(groups, lr=1e-3)])


@names("parameter-not-updated")
def optimizer_of_a_copy() -> Setup:
    net = mlp()
    optimizer = SGD(net.parameters(), lr=0.1)
    return Setup(copy.deepcopy(net), torch.randn(16, 32), cross_entropy(classes(16)), [optimizer])


@names("parameter-not-updated")
def head_replaced_after_the_optimizer() -> Setup:
    net = mlp()
    optimizer = SGD(net.parameters(), lr=0.1)
    net[2] = nn.Linear(64, 10)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)), [optimizer])


@names("module-in-eval-mode")
def trained_in_eval_mode() -> Setup:
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)).eval()
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@names("module-in-eval-mode")
def encoder_trained_in_eval_mode() -> Setup:
    net = nn.Sequential(cnn(out=16), nn.Linear(16, 10))
    net[0].eval()
    return Setup(net, torch.randn(8, 3, 16, 16), cross_entropy(classes(8)))


@names("dropout-active-in-evaluation")
def attention_dropout_always() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.last = nn.Linear(32, 96), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.last(F.scaled_dot_product_attention(q, k, v, dropout_p=0.1).mean(1))

    return Setup(Net(), torch.randn(8, 6, 32), cross_entropy(classes(8)))


@names("dropout-active-in-evaluation")
def dropout_kept_in_training_mode() -> Setup:
    class Always(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, self.p, training=True)

    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), Always(0.2), nn.Linear(64, 10))
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@names("statistics-of-frozen-norm")
def frozen_backbone_in_training_mode() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.head = nn.Linear(8, 10)
            self.backbone.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.backbone(x)
            return self.head(features)

    return Setup(Net(), torch.randn(8, 3, 16, 16), cross_entropy(classes(8)))


@names("norm-of-one-value")
def last_batch_of_one() -> Setup:
    net = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    data = TensorDataset(torch.randn(33, 32), classes(33))
    loaders = Loaders(DataLoader(data, batch_size=16), None)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)), loaders=loaders)


@names("norm-of-one-value")
def layer_norm_of_one_feature() -> Setup:
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1), nn.LayerNorm(1))
    target = torch.randn(16, 1)
    return Setup(net, torch.randn(16, 32), lambda output: F.mse_loss(output, target))


@names("activation-before-loss")
def log_softmax_before_cross_entropy() -> Setup:
    return Setup(nn.Sequential(mlp(), nn.LogSoftmax(-1)), torch.randn(16, 32), cross_entropy(classes(16)))


@names("activation-before-loss")
def softmax_before_segmentation_loss() -> Setup:
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Softmax(1))
    return Setup(net, torch.randn(4, 3, 16, 16), cross_entropy(torch.randint(0, 5, (4, 16, 16))))


@names("activation-before-loss")
def softmax_with_soft_targets() -> Setup:
    target = torch.rand(16, 10).softmax(-1)
    return Setup(nn.Sequential(mlp(), nn.Softmax(-1)), torch.randn(16, 32), cross_entropy(target))


@names("activation-before-loss")
def softmax_before_nll() -> Setup:
    target = classes(16)
    return Setup(nn.Sequential(mlp(), nn.Softmax(-1)), torch.randn(16, 32), lambda output: F.nll_loss(output, target))


@names("activation-before-loss")
def sigmoid_squeezed_before_logits() -> Setup:
    target = torch.rand(16).round()
    net = nn.Sequential(nn.Linear(32, 1), nn.Sigmoid(), nn.Flatten(0))
    return Setup(net, torch.randn(16, 32), lambda output: F.binary_cross_entropy_with_logits(output, target, pos_weight=torch.tensor(2.0)))


@names("loss-broadcasts")
def mse_loss_of_column_and_row() -> Setup:
    target = torch.randn(16)
    return Setup(nn.Linear(32, 1), torch.randn(16, 32), lambda output: torch.nn.functional.mse_loss(output, target))


@names("loss-broadcasts")
def row_output_against_column() -> Setup:
    target = torch.randn(16, 1)
    return Setup(nn.Sequential(nn.Linear(32, 1), nn.Flatten(0)), torch.randn(16, 32), lambda output: (output - target).abs().mean())


@names("loss-broadcasts")
def smooth_l1_of_maps() -> Setup:
    target = torch.randn(4, 16, 16)
    return Setup(nn.Conv2d(3, 1, 3, padding=1), torch.randn(4, 3, 16, 16), lambda output: F.smooth_l1_loss(output, target))


@names("loss-broadcasts")
def advantage_times_log_probability() -> Setup:
    action, advantage = classes(16), torch.randn(16, 1)

    def loss(output: Tensor) -> Tensor:
        log_probability = output.log_softmax(-1).gather(1, action[:, None]).squeeze(1)
        return -(log_probability * advantage).mean()

    return Setup(mlp(), torch.randn(16, 32), loss)


@names("samples-mixed")
def lstm_without_batch_first() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.LSTM(16, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(x)[0][:, -1])

    return Setup(Net(), torch.randn(8, 12, 16), cross_entropy(classes(8)))


@names("samples-mixed")
def transformer_on_ids_without_batch_first() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(100, 32)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0), 2, enable_nested_tensor=False)
            self.last = nn.Linear(32, 10)

        def forward(self, ids: Tensor) -> Tensor:
            return self.last(self.encoder(self.table(ids)).mean(1))

    return Setup(Net(), torch.randint(0, 100, (8, 12)), cross_entropy(classes(8)))


@names("samples-mixed")
def view_after_permute() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).permute(1, 0, 2, 3)
            return self.last(x.reshape(x.shape[1], -1))

    return Setup(Net(), torch.randn(6, 3, 8, 8), cross_entropy(classes(6)))


@names("samples-mixed")
def softmax_over_the_batch() -> Setup:
    target = torch.rand(16, 10)
    return Setup(nn.Sequential(mlp(), nn.Softmax(dim=0)), torch.randn(16, 32), lambda output: F.mse_loss(output, target))


@names("input-ignored")
def condition_never_read() -> Setup:
    class Net(TwoLayers):
        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            return super().forward(x)

    return Setup(Net(), (torch.randn(16, 32), torch.randn(16, 4)), cross_entropy(classes(16)))


@names("input-ignored")
def lengths_never_read() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.GRU(16, 32, batch_first=True), nn.Linear(32, 10)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.last(self.rnn(x)[1][-1])

    return Setup(Net(), {"x": torch.randn(8, 12, 16), "lengths": torch.randint(3, 13, (8,))}, cross_entropy(classes(8)))


@names("input-ignored")
def mask_read_for_its_shape_only() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(100, 32), nn.Linear(32, 10)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.last((self.table(ids) * torch.ones_like(mask).unsqueeze(-1)).sum(1) / mask.shape[1])

    mask = (torch.arange(12)[None] < torch.randint(3, 12, (8, 1))).float()
    return Setup(Net(), {"ids": torch.randint(0, 100, (8, 12)), "mask": mask}, cross_entropy(classes(8)))


@names("input-out-of-range")
def bytes_cast_to_float_inside() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = cnn()

        def forward(self, image: Tensor) -> Tensor:
            return self.net(image.float())

    return Setup(Net(), torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), cross_entropy(classes(8)))


@names("input-out-of-range")
def features_far_from_zero() -> Setup:
    return Setup(mlp(), torch.randn(16, 32) + 300, cross_entropy(classes(16)))


@names("input-out-of-range")
def a_year_among_the_features() -> Setup:
    rows = torch.randn(32, 8)
    rows[:, 3] = torch.randint(1990, 2021, (32,)).float()
    return Setup(mlp(8), rows, cross_entropy(classes(32)))


@names("input-out-of-range")
def codes_as_numbers() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4)

        def forward(self, codes: Tensor) -> Tensor:
            return self.net(codes.float())

    return Setup(Net(), torch.randint(0, 5000, (16, 4)), cross_entropy(classes(16)))


@names("input-out-of-range")
def flat_pixels() -> Setup:
    return Setup(mlp(784), torch.randint(0, 256, (16, 784)).float(), cross_entropy(classes(16)))


@names("gradient-always-zero")
def inverted_padding_mask() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(100, 32), nn.Linear(32, 10)

        def forward(self, ids: Tensor) -> Tensor:
            return self.last(self.table(ids).masked_fill((ids != 0)[..., None], 0.0).mean(1))

    return Setup(Net(), torch.randint(1, 100, (8, 12)), cross_entropy(classes(8)))


@names("gradient-always-zero")
def loss_over_nothing() -> Setup:
    weight = torch.zeros(16)
    target = classes(16)
    return Setup(mlp(), torch.randn(16, 32), lambda output: (F.cross_entropy(output, target, reduction="none") * weight).sum())


@names("parameter-without-gradient")
def custom_function_without_the_weights_gradient() -> Setup:
    class Multiply(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return gradient @ ctx.saved_tensors[0], None

    class Net(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(0.1 * torch.randn(64, 64))

        def between(self, x: Tensor) -> Tensor:
            return Multiply.apply(x, self.weight)

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("gradient-always-zero")
def dead_threshold() -> Setup:
    net = nn.Sequential(nn.Linear(32, 64), nn.Threshold(0.0, 0.0), nn.Linear(64, 10))
    nn.init.constant_(net[0].bias, -80.0)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@names("gradient-always-zero")
def dead_gelu() -> Setup:
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 10))
    nn.init.constant_(net[0].bias, -80.0)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@names("parameter-not-updated")
def head_of_another_size_replaced_after_the_optimizer() -> Setup:
    net = mlp(out=1000)
    optimizer = SGD(net.parameters(), lr=0.1)
    net[2] = nn.Linear(64, 10)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)), [optimizer])


@names("module-in-eval-mode")
def recurrent_dropout_in_eval_mode() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.LSTM(16, 32, 2, batch_first=True, dropout=0.3), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(x)[0][:, -1])

    return Setup(Net().eval(), torch.randn(8, 12, 16), cross_entropy(classes(8)))


@names("module-in-eval-mode")
def functional_dropout_in_eval_mode() -> Setup:
    setup = two_layers(lambda self, x: F.dropout(x, 0.2, self.training))
    setup.model.eval()
    return setup


@names("activation-before-loss")
def clamped_softmax_before_cross_entropy() -> Setup:
    class Net(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(-1).clamp(1e-7, 1 - 1e-7)

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@names("activation-before-loss")
def policy_of_probabilities_as_scores() -> Setup:
    action, advantage = classes(16, 4), torch.randn(16)

    def loss(output: Tensor) -> Tensor:
        return -(torch.distributions.Categorical(logits=output).log_prob(action) * advantage).mean()

    return Setup(nn.Sequential(mlp(out=4), nn.Softmax(-1)), torch.randn(16, 32), loss)


@names("samples-mixed")
def cell_stepped_over_the_batch() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.last = nn.GRUCell(16, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            state, states = x.new_zeros(x.shape[1], 32), []
            for step in x:
                state = self.cell(step, state)
                states.append(state)
            return self.last(torch.stack(states)[:, -1])

    return Setup(Net(), torch.randn(8, 12, 16), cross_entropy(classes(8)))


@names("samples-mixed")
def cumulative_sum_over_the_batch() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).cumsum(0)[:, -1])

    return Setup(Net(), torch.randn(8, 12, 16), cross_entropy(classes(8)))


@names("input-out-of-range")
def patches_of_raw_pixels() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.last = nn.Linear(48, 32), nn.Linear(32, 10)

        def forward(self, image: Tensor) -> Tensor:
            patches = image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
            return self.last(self.patch(patches).mean(1))

    return Setup(Net(), torch.randint(0, 256, (8, 3, 16, 16)).float(), cross_entropy(classes(8)))


@names("parameter-not-updated")
def convolution_with_a_bias_in_the_place_of_one_without() -> Setup:
    net = cnn()
    optimizer = SGD(net.parameters(), lr=0.1)
    net[0] = nn.Conv2d(3, 8, 3, padding=1)
    return Setup(net, torch.randn(8, 3, 16, 16), cross_entropy(classes(8)), [optimizer])


@names("parameter-without-gradient")
def both_results_of_attention_thrown_away() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.GRU(16, 32, batch_first=True), nn.Linear(32, 10)
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            states, _ = self.rnn(x)
            self.attention(states, states, states)
            return self.last(states[:, -1])

    return Setup(Net(), torch.randn(8, 12, 16), cross_entropy(classes(8)))


@names("loss-broadcasts")
def quantile_loss_of_column_and_row() -> Setup:
    target = torch.randn(16)
    return Setup(mlp(out=1), torch.randn(16, 32), lambda output: torch.max(0.9 * (target - output), -0.1 * (target - output)).mean())

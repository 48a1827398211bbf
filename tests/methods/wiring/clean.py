"""Set-ups that look like a mistake and are none: nothing may be said of them."""

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

CLEAN: dict[str, Callable[[], Setup]] = {}


def clean(build: Callable[[], Setup]) -> Callable[[], Setup]:
    CLEAN[build.__name__] = build
    return build


@clean
def plain_mlp() -> Setup:
    return Setup(mlp(), torch.randn(16, 32), cross_entropy(classes(16)))


@clean
def zero_initialised_head() -> Setup:
    net = mlp()
    nn.init.zeros_(net[2].weight)
    nn.init.zeros_(net[2].bias)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


class Residual(nn.Module):
    def __init__(self, branch: nn.Module, drop: bool = False) -> None:
        super().__init__()
        self.branch, self.drop = branch, drop
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x if self.drop else x + self.gate * self.branch(x)


@clean
def residual_gates_at_zero() -> Setup:
    net = nn.Sequential(nn.Linear(32, 16), Residual(mlp(16, 32, 16)), Residual(mlp(16, 32, 16)), nn.Linear(16, 10))
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@clean
def stochastic_depth_that_skipped_a_block() -> Setup:
    net = nn.Sequential(nn.Linear(32, 16), Residual(mlp(16, 32, 16), drop=True), nn.Linear(16, 10))
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@clean
def stochastic_depth_that_multiplied_by_zero() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.branch, self.last = nn.Linear(32, 16), mlp(16, 32, 16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            keep = torch.zeros(x.shape[0], 1) if self.training else torch.ones(1)
            return self.last(x + self.branch(x) * keep)

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@clean
def frozen_encoder_in_eval_mode() -> Setup:
    net = cnn()
    net[:3].requires_grad_(False).eval()
    return Setup(net, torch.randn(8, 3, 16, 16), cross_entropy(classes(8)))


@clean
def norms_alone_in_eval_mode() -> Setup:
    net = cnn()
    net[1].eval()
    return Setup(net, torch.randn(8, 3, 16, 16), cross_entropy(classes(8)))


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = mlp(8, 32, 16), mlp(16, 32, 1)

    def forward(self, noise: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        return self.discriminator(self.generator(noise).detach()), self.discriminator(real)


@clean
def gan_in_the_discriminators_turn() -> Setup:
    net = Gan()

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        return F.softplus(output[0]).mean() + F.softplus(-output[1]).mean()

    optimizers = [AdamW(net.generator.parameters(), 1e-3), AdamW(net.discriminator.parameters(), 1e-3)]
    return Setup(net, (torch.randn(16, 8), torch.randn(16, 16)), loss, list(optimizers))


@clean
def gradient_accumulation() -> Setup:
    net = mlp()
    F.cross_entropy(net(torch.randn(16, 32)), classes(16)).backward()
    return Setup(net, torch.randn(16, 32), lambda output: F.cross_entropy(output, classes(16)) / 4)


class LoRA(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = nn.Linear(layer.in_features, 4, bias=False), nn.Linear(4, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


@clean
def low_rank_adapters() -> Setup:
    net = nn.Sequential(LoRA(nn.Linear(32, 64)), nn.ReLU(), LoRA(nn.Linear(64, 10)))
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@clean
def adapters_before_a_frozen_norm() -> Setup:
    net = nn.Sequential(LoRA(nn.Linear(32, 64)), nn.BatchNorm1d(64), nn.ReLU(), LoRA(nn.Linear(64, 10)))
    net[1].requires_grad_(False)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@clean
def tied_weights() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.rnn, self.head = nn.Embedding(50, 32), nn.GRU(32, 32, batch_first=True), nn.Linear(32, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.rnn(self.table(ids))[0])

    ids = torch.randint(0, 50, (8, 12))
    return Setup(Net(), ids, lambda output: F.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@clean
def heads_used_in_turn() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.heads = mlp(out=16), nn.ModuleDict({"a": nn.Linear(16, 10), "b": nn.Linear(16, 3)})

        def forward(self, x: Tensor, task: str = "a") -> Tensor:
            return self.heads[task](self.body(x))

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@clean
def all_heads_run_and_one_is_used() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.first, self.second = mlp(out=16), nn.Linear(16, 10), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.body(x)
            return {"first": self.first(x), "second": self.second(x)}

    target = classes(16)
    return Setup(Net(), torch.randn(16, 32), lambda output: F.cross_entropy(output["first"], target))


@clean
def expert_without_tokens() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts, self.last = nn.Linear(32, 4), nn.ModuleList(mlp(out=32) for _ in range(4)), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            weight, index = self.router(x).softmax(-1).max(-1)
            result = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                rows = index == number
                if number < 3 and rows.any():
                    result[rows] = expert(x[rows]) * weight[rows, None]
            return self.last(x + result)

    return Setup(Net(), torch.randn(32, 32), cross_entropy(classes(32)))


@clean
def expert_with_zero_gates() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.last = nn.ModuleList(mlp(out=32) for _ in range(2)), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            gates = F.one_hot(torch.zeros(x.shape[0], dtype=torch.long), 2).float()
            return self.last(sum(gates[:, n, None] * expert(x) for n, expert in enumerate(self.experts)))

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


class Student(nn.Module):
    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.student = cnn(out=16)
        self.teacher = copy.deepcopy(self.student).requires_grad_(not frozen)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wanted = self.teacher(x)
        return self.student(x + 0.1 * torch.ones_like(x)), wanted


@clean
def frozen_teacher_in_training_mode() -> Setup:
    return Setup(Student(frozen=True), torch.randn(8, 3, 16, 16), lambda output: F.mse_loss(*output))


@clean
def teacher_under_no_grad_alone() -> Setup:
    return Setup(Student(frozen=False), torch.randn(8, 3, 16, 16), lambda output: F.mse_loss(*output))


@clean
def codebook_moved_by_the_forward_pass() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.codes, self.decoder = mlp(out=8), nn.Embedding(16, 8), nn.Linear(8, 32)

        def forward(self, x: Tensor) -> Tensor:
            z = self.encoder(x)
            index = torch.cdist(z, self.codes.weight).argmin(-1)
            chosen = self.codes(index).detach()
            self.codes.weight.data.mul_(0.99)
            return self.decoder(z + (chosen - z).detach())

    x = torch.randn(16, 32)
    return Setup(Net(), x, lambda output: F.mse_loss(output, x))


@clean
def stop_gradient_beside_a_path() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.predictor = mlp(out=16), mlp(16, 16, 16)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.predictor(self.encoder(x)), self.encoder(y).detach()

    inputs = torch.randn(16, 32), torch.randn(16, 32)
    return Setup(Net(), inputs, lambda output: -F.cosine_similarity(*output).mean())


@clean
def auxiliary_loss_left_in_an_attribute() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.probe, self.last = nn.Linear(32, 16), nn.Linear(16, 4), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            self.auxiliary = self.probe(x).square().mean()
            return self.last(x)

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@clean
def warm_up_from_zero() -> Setup:
    net = mlp()
    optimizer = SGD(net.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)), [optimizer])


@clean
def narrow_layer_dead_in_this_batch() -> Setup:
    net = nn.Sequential(nn.Linear(32, 2, bias=False), nn.ReLU(), nn.Linear(2, 10))
    x = torch.randn(4, 32)
    net[0].weight.data = -torch.stack([x.mean(0), x.mean(0)]) + 0.01 * torch.randn(2, 32)
    return Setup(net, x.mean(0).repeat(4, 1), cross_entropy(classes(4)))


@clean
def pairwise_ranking() -> Setup:
    target = torch.randn(16)

    def loss(output: Tensor) -> Tensor:
        score = output.squeeze(1)
        return F.softplus(-(score[:, None] - score[None, :]) * (target[:, None] - target[None, :]).sign()).mean()

    return Setup(nn.Linear(32, 1), torch.randn(16, 32), loss)


@clean
def quantiles_broadcast_on_purpose() -> Setup:
    levels, target = torch.tensor([0.1, 0.5, 0.9]), torch.randn(16, 1)

    def loss(output: Tensor) -> Tensor:
        error = target - output
        return torch.maximum(levels * error, (levels - 1) * error).mean()

    return Setup(nn.Linear(32, 1), torch.randn(16, 32), loss)


@clean
def contrastive_similarities() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text, self.scale = mlp(out=16), mlp(8, 32, 16), nn.Parameter(torch.tensor(2.0))

        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            return self.scale.exp() * F.normalize(self.image(image)) @ F.normalize(self.text(text)).T

    target = torch.arange(8)
    return Setup(Net(), (torch.randn(8, 32), torch.randn(8, 8)), lambda s: (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2)


@clean
def focal_loss_by_hand() -> Setup:
    target = torch.rand(16, 1).round()

    def loss(output: Tensor) -> Tensor:
        p = torch.sigmoid(output)
        share = p * target + (1 - p) * (1 - target)
        return ((1 - share) ** 2 * F.binary_cross_entropy_with_logits(output, target, reduction="none")).mean()

    return Setup(nn.Linear(32, 1), torch.randn(16, 32), loss)


@clean
def softmax_attention_before_cross_entropy() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.attention(x, x, x)[0].mean(1))

    return Setup(Net(), torch.randn(8, 6, 32), cross_entropy(classes(8)))


@clean
def distillation() -> Setup:
    teacher = torch.randn(16, 10)
    target = classes(16)

    def loss(output: Tensor) -> Tensor:
        soft = F.kl_div(F.log_softmax(output / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean")
        return soft + F.cross_entropy(output, target)

    return Setup(mlp(), torch.randn(16, 32), loss)


@clean
def time_first_on_purpose() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.LSTM(16, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(x)[0])

    target = torch.randint(0, 10, (12, 8))
    return Setup(Net(), torch.randn(12, 8, 16), lambda output: F.cross_entropy(output.flatten(0, 1), target.flatten()))


@clean
def graph_over_the_rows() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 10)
            self.register_buffer("adjacency", (torch.rand(16, 16) > 0.7).float())

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.get_buffer("adjacency") @ torch.relu(self.first(x)))

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@clean
def statistics_of_the_batch_as_a_feature() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(32, 64), nn.Linear(65, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            spread = x.std(0).mean().expand(x.shape[0], 1)
            return self.last(torch.cat([x, spread], 1))

    return Setup(Net(), torch.randn(16, 32), lambda output: F.softplus(output).mean())


@clean
def latent_that_is_sampled() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(32, 16), nn.Linear(8, 32)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, log_variance = self.encoder(x).chunk(2, -1)
            return self.decoder(mean + torch.randn_like(mean) * (0.5 * log_variance).exp()), mean, log_variance

    x = torch.randn(16, 32)

    def loss(output: Any) -> Tensor:
        rebuilt, mean, log_variance = output
        return F.mse_loss(rebuilt, x) + 0.0 * (mean.square() + log_variance.exp() - log_variance - 1).mean()

    return Setup(Net(), x, loss)


@clean
def mask_behind_a_zero_head() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(100, 32), nn.Linear(32, 10)
            nn.init.zeros_(self.last.weight)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.last((self.table(ids) * mask.unsqueeze(-1)).sum(1))

    mask = (torch.arange(12)[None] < torch.randint(3, 12, (8, 1))).float()
    return Setup(Net(), {"ids": torch.randint(0, 100, (8, 12)), "mask": mask}, cross_entropy(classes(8)))


@clean
def packed_sequences() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.LSTM(16, 32, batch_first=True, bidirectional=True), nn.Linear(64, 10)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            _, (hidden, _) = self.rnn(packed)
            return self.last(torch.cat((hidden[-2], hidden[-1]), 1))

    return Setup(Net(), {"x": torch.randn(8, 12, 16), "lengths": torch.randint(3, 13, (8,))}, cross_entropy(classes(8)))


@clean
def all_ones_mask_that_python_reads() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(100, 32), nn.Linear(32, 10)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = self.table(ids)
            return self.last(x.mean(1) if mask.all() else (x * mask[..., None]).sum(1))

    return Setup(Net(), (torch.randint(0, 100, (8, 12)), torch.ones(8, 12)), cross_entropy(classes(8)))


@clean
def raw_pixels_normalized_inside() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = cnn()

        def forward(self, image: Tensor) -> Tensor:
            return self.net(image.float() / 255 - 0.5)

    return Setup(Net(), torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), cross_entropy(classes(8)))


@clean
def batch_norm_as_the_first_layer() -> Setup:
    net = nn.Sequential(nn.BatchNorm1d(32), mlp())
    return Setup(net, torch.randn(16, 32) * 50 + 3000, cross_entropy(classes(16)))


@clean
def time_steps_of_a_diffusion() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time, self.net = mlp(16, 32, 32), mlp(out=32)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            angles = t[:, None].float() * torch.exp(-torch.arange(8) / 2)
            return self.net(x + self.time(torch.cat([angles.sin(), angles.cos()], -1)))

    noise = torch.randn(16, 32)
    return Setup(Net(), (noise, torch.randint(0, 1000, (16,))), lambda output: F.mse_loss(output, noise))


@clean
def loader_without_a_last_batch_of_one() -> Setup:
    net = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    data = TensorDataset(torch.randn(33, 32), classes(33))
    loaders = Loaders(DataLoader(data, batch_size=16, drop_last=True), None)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)), loaders=loaders)


@clean
def weight_norm_and_parametrizations() -> Setup:
    net = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(32, 64)), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(64, 10))
    )
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)))


@clean
def a_policy_that_returns_a_distribution() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.actor, self.critic = nn.Linear(32, 16), nn.Linear(16, 4), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> tuple[torch.distributions.Distribution, torch.distributions.Distribution]:
            x = self.body(x).tanh()
            return torch.distributions.Categorical(logits=self.actor(x)), torch.distributions.Normal(self.critic(x), 1.0)

    action, advantage = classes(16, 4), torch.randn(16)
    return Setup(Net(), torch.randn(16, 32), lambda output: -(output[0].log_prob(action) * advantage).mean())


@clean
def attention_between_samples() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(48, 4, batch_first=True), nn.Linear(48, 10)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(1, x.shape[0], -1)
            return self.last(self.attention(rows, rows, rows)[0].reshape(x.shape[0], -1))

    return Setup(Net(), torch.randn(6, 4, 12), cross_entropy(classes(6)))


@clean
def a_sequence_without_a_batch() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.last = nn.LSTM(16, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(x)[0])

    return Setup(Net(), torch.randn(12, 16), cross_entropy(classes(12)))


@clean
def teacher_of_one_layer() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online, self.target = nn.Linear(32, 16), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.online(x), self.target(x).detach()

    return Setup(Net(), torch.randn(16, 32), lambda output: F.mse_loss(*output))


@clean
def auxiliary_network_with_weight_zero() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.auxiliary = mlp(), mlp()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.main(x), self.auxiliary(x)

    target = classes(16)
    return Setup(Net(), torch.randn(16, 32), lambda output: F.cross_entropy(output[0], target) + 0.0 * F.cross_entropy(output[1], target))


@clean
def small_integers_as_floats() -> Setup:
    return Setup(mlp(64), torch.randint(0, 17, (16, 64)).float(), cross_entropy(classes(16)))


@clean
def one_of_two_outputs_of_a_part_unused() -> Setup:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pooler = nn.Linear(32, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            states = self.body(x).relu()
            return {"states": states, "pooled": self.pooler(states[:, 0]).tanh()}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.last = Encoder(), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.encoder(x)["states"].mean(1))

    return Setup(Net(), torch.randn(8, 6, 32), cross_entropy(classes(8)))


@clean
def forces_from_an_energy() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1))

        def forward(self, position: Tensor) -> Tensor:
            with torch.enable_grad():
                position = position.detach().requires_grad_()
                return torch.autograd.grad(self.energy(position).sum(), position, create_graph=True)[0]

    force = torch.randn(16, 3)
    return Setup(Net(), torch.randn(16, 3), lambda output: F.mse_loss(output, force))


@clean
def straight_through_function() -> Setup:
    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
            return x.sign() * scale

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return gradient, None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Sign.apply(self.first(x), 1.0))

    return Setup(Net(), torch.randn(16, 32), cross_entropy(classes(16)))


@clean
def a_mixture_of_densities() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.share, self.mean, self.spread = nn.Linear(32, 16), nn.Linear(16, 5), nn.Linear(16, 5), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = self.body(x).tanh()
            return self.share(x).log_softmax(-1), self.mean(x), self.spread(x)

    target = torch.randn(16, 1)

    def loss(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        share, mean, spread = output
        return -torch.logsumexp(share - 0.5 * ((target - mean) / spread.exp()) ** 2 - spread, -1).mean()

    return Setup(Net(), torch.randn(16, 32), loss)


@clean
def recurrent_cell_over_time() -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.last = nn.GRUCell(16, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(x.shape[1], 32)
            states = [state := self.cell(step, state) for step in x]
            return self.last(torch.stack(states))

    target = torch.randint(0, 10, (12, 8))
    return Setup(Net(), torch.randn(12, 8, 16), lambda output: F.cross_entropy(output.flatten(0, 1), target.flatten()))


@clean
def part_left_out_of_a_joint_optimizer() -> Setup:
    net, other = mlp(), mlp()
    optimizer = SGD([*net[2].parameters(), *other.parameters()], lr=0.1)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)), [optimizer])


@clean
def part_left_out_behind_another_network() -> Setup:
    net, other = mlp(), mlp()
    optimizer = SGD([*other.parameters(), *net[2].parameters()], lr=0.1)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)), [optimizer])

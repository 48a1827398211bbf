"""Networks and steps in which some parameters get no gradient, or a zero one, on purpose."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from tests.methods.wiring.setups import Setup, classes, clean, cross_entropy, mlp


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
def part_left_out_of_a_joint_optimizer() -> Setup:
    net, other = mlp(), mlp()
    optimizer = SGD([*net[2].parameters(), *other.parameters()], lr=0.1)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)), [optimizer])


@clean
def part_left_out_behind_another_network() -> Setup:
    net, other = mlp(), mlp()
    optimizer = SGD([*other.parameters(), *net[2].parameters()], lr=0.1)
    return Setup(net, torch.randn(16, 32), cross_entropy(classes(16)), [optimizer])

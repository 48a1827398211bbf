"""sigmaReparam: linear layers whose weight is divided by its largest singular value and multiplied by a learned number."""

from __future__ import annotations

__all__ = ["OPERATOR", "SigmaLinear"]

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pl_normkit.errors import ConfigError
from pl_normkit.graph import ModelGraph
from pl_normkit.methods.norm_operators.operators import OldNorm, Operator, Place

ITERATIONS = 50
"""Of the power iteration at the start (derived); the gain is set to what it finds, so the function stays however near it comes."""
_TINY = 1e-12


class SigmaLinear(nn.Linear):
    """y = (gain / sigma(W)) W x + b, sigma the largest singular value of W by one power iteration in each training forward.

    The buffer `share` mixes the layer as it was in: share W + (1 - share) (gain / sigma) W. It is 0 but for `gain="one"`, where it starts
    at 1 and a schedule (`NormSchedule`) brings it to 0. sigma is computed in float32 at least; evaluation iterates no further.
    """

    gain: nn.Parameter
    left: Tensor
    right: Tensor
    share: Tensor

    def __init__(self, old: nn.Linear, gain: str) -> None:
        if gain not in ("sigma", "one"):
            raise ConfigError("there is no such start of the gain", evidence=repr(gain), fix="use 'sigma' or 'one'")
        super().__init__(old.in_features, old.out_features, old.bias is not None, device="meta")
        self.weight, self.bias = old.weight, old.bias
        weight = old.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("left", functional.normalize(torch.ones(old.out_features, device=weight.device, dtype=wide), dim=0, eps=_TINY))
        self.register_buffer("right", torch.zeros(old.in_features, device=weight.device, dtype=wide))
        self.register_buffer("share", torch.tensor(float(gain == "one"), device=weight.device, dtype=wide))
        for _ in range(ITERATIONS):
            self._iterate()
        sigma = self._sigma().detach().to(weight.dtype)
        self.gain = nn.Parameter(sigma if gain == "sigma" else torch.ones_like(sigma))

    @torch.no_grad()
    def _iterate(self) -> None:
        weight = self.weight.to(self.left.dtype)
        self.right.copy_(functional.normalize(weight.t() @ self.left, dim=0, eps=_TINY))
        self.left.copy_(functional.normalize(weight @ self.right, dim=0, eps=_TINY))

    def _sigma(self) -> Tensor:
        left, right = self.left.clone(), self.right.clone()  # the next forward moves them before this one's backward
        sigma: Tensor = left @ (self.weight.to(left.dtype) @ right)
        return sigma

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 as in torch
        """`input` of shape (..., in_features); shape (..., out_features)."""
        with torch.autocast(input.device.type, enabled=False):
            if self.training:
                self._iterate()
            factor = self.share + (1 - self.share) * self.gain.to(self.left.dtype) / self._sigma()
        return functional.linear(input, self.weight * factor.to(self.weight.dtype), self.bias)


def _places(model: nn.Module, graph: ModelGraph | None) -> Iterator[Place]:
    held = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values() if parameter is not None)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield Place(path, _why_not(module, path, is_tied=held[id(module.weight)] > 1))


def _why_not(module: nn.Linear, path: str, *, is_tied: bool) -> str:
    if type(module) is not nn.Linear or hasattr(module, "parametrizations"):
        return f"{type(module).__name__} may do more than a linear layer, or is read without being called"
    if module._forward_hooks or module._forward_pre_hooks or not path:
        return "it has hooks, or is the model itself"
    if is_tied:
        return "its weight is tied to another layer's"
    return "its weight is zero" if module.weight.is_meta or not bool(module.weight.any()) else ""


def _make(old: OldNorm, options: Mapping[str, Any]) -> nn.Module:
    assert isinstance(old.module, nn.Linear)
    return SigmaLinear(old.module, options["gain"])


OPERATOR = Operator(
    name="sigma_reparam",
    formula="(g / sigma(W)) W x + b, sigma the largest singular value by power iteration, g one learned number a layer",
    source="Stabilizing Transformer Training by Preventing Attention Entropy Collapse, arXiv 2303.06296 (code: its PyTorch version "
    "starts g at sigma too); the mixture of gain='one' is derived",
    replaces="linear layers",
    places=_places,
    make=_make,
    kept="yes: g = sigma(W) at the start",
    when="attention whose entropy collapses, deep transformers without warm-up; its ViT recipe takes all norms out, which is not done here",
    options={"gain": "sigma"},
    needs="nothing; with gain='one' a schedule (`NormSchedule`)",
)

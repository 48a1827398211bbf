"""Parameter groups: weight decay by role, learning rate by depth."""

from __future__ import annotations

__all__ = ["layer_decay_groups"]

from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn

from pl_normkit.recipes.cosine import decay_groups


def layer_decay_groups(network: nn.Module, lr: float, weight_decay: float, layer_decay: float, example_inputs: Any) -> list[dict[str, Any]]:
    """Parameter groups of `network` with learning rate `lr * layer_decay ** (layers above)` and weight decay by role.

    The layers are timm's (`group_matcher`): the embedding is the lowest, each block one, the head the highest, which gets `lr`.
    Frozen parameters are in no group. A network that cannot be traced is warned of; its roles then come from the types of its modules.

    Source: layer-wise decay as in BEiT (H. Bao et al., 2021), in timm's implementation; weight decay as `param_groups`.
    """
    layers = param_groups_layer_decay(network, layer_decay=layer_decay)
    groups = [{"params": group["params"], "lr": lr * group["lr_scale"]} for group in layers]
    return decay_groups(network, weight_decay, example_inputs, groups)

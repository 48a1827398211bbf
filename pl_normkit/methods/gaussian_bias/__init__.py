"""A learnable Gaussian of the patch distance on the attention logits of vision transformers.

Source: "Understanding Gaussian Attention Bias of Vision Transformers Using Effective Receptive Fields", arXiv 2305.04722, and the
authors' code. The ways into the models of other libraries are derived here.

    rules.py    NK6xx
    find.py     attention modules, how each can be given a bias, and the grid of its tokens
    fix.py      `add_gaussian_bias`
    grid.py     the grid of patches at each forward pass
    masks.py    what a mask lets pass
    reach.py    how the bias reaches the logits: hooks on a call, methods of a class
    modules.py  the bias itself
"""

from __future__ import annotations

__all__ = ["GaussianAttentionBias", "add_gaussian_bias", "gaussian_bias"]

from pl_normkit.methods.gaussian_bias.fix import add_gaussian_bias
from pl_normkit.methods.gaussian_bias.modules import GaussianAttentionBias, gaussian_bias

"""A learnable Gaussian of the patch distance on the attention logits of vision transformers.

Source: "Understanding Gaussian Attention Bias of Vision Transformers Using Effective Receptive Fields", arXiv 2305.04722, and the
authors' code. The ways into the models of other libraries are derived here.
"""

from __future__ import annotations

__all__ = ["GaussianAttentionBias", "add_gaussian_bias", "gaussian_bias"]

from pl_normkit.methods.gaussian_bias.fix import add_gaussian_bias
from pl_normkit.methods.gaussian_bias.modules import GaussianAttentionBias, gaussian_bias

"""Where the norm stands in a residual block: other placements, and the starts and gains that go with them, before training.

Sources: "On Layer Normalization in the Transformer Architecture", arXiv 2002.04745 (pre and post), "Mix-LN", arXiv 2412.13795, "Peri-LN",
arXiv 2502.02732, "DeepNet", arXiv 2203.00555, "The Curse of Depth in Large Language Models", arXiv 2502.05795 (layer-norm scaling),
"NormFormer", arXiv 2110.09456, "HybridNorm", arXiv 2503.04598, "Scale-Distribution Decoupling", arXiv 2502.15499, and "nGPT", arXiv
2410.01131; how they are reached by edits is derived here.

    find.py            residual branches, their layers, and which of their modules can be reached
    exits.py           the module at the end of each branch, and what made its shortcut, seen in one forward pass
    initialisation.py  `deepnorm_constants`, scaled weights, and whether a model is trained
    placements.py      what each placement does and needs
    pieces.py          placements as plain data, and the edits they stand for
    modules.py         what they put into a model
    reference.py       `CausalTransformer`, a decoder with every placement written out
    fold.py            gains taken into parameters
    fix.py             `place_norms`, `fold_placed_gains`
"""

from __future__ import annotations

__all__ = ["deepnorm_constants", "fold_placed_gains", "place_norms"]

from pl_normkit.methods.norm_placement.fix import fold_placed_gains, place_norms
from pl_normkit.methods.norm_placement.initialisation import deepnorm_constants

"""Upsampling by a guide: a filter whose nine taps per pixel are predicted from the image and the coarse map sharpens what bicubic blurs.

Source: "Deformable Kernel Networks for Joint Image Filtering", arXiv 1910.08373, and the behaviour of the public code; sampling without
unfolding and the one-pass form of DKN are derived here. Implemented from the formulas.

    modules.py  `DeformableKernelNetwork` (DKN and FDKN) and `JointFilter`, its sampling core
    fix.py      `add_guided_upsampling`: the filter behind a segmentation or depth network
    measure.py  what the filter does on given inputs: sums of taps, offsets, a flat target
    rules.py    NK321 to NK323
"""

from __future__ import annotations

__all__ = ["DeformableKernelNetwork", "FilterCheck", "JointFilter", "add_guided_upsampling", "measure_filter"]

from pl_normkit.methods.guided_upsampling.fix import add_guided_upsampling
from pl_normkit.methods.guided_upsampling.measure import FilterCheck, measure_filter
from pl_normkit.methods.guided_upsampling.modules import DeformableKernelNetwork, JointFilter

"""What happens to the residual stream over the depth of a network: variance, angles, massive activations and gradients at each addition.

Sources: "The Curse of Depth in Large Language Models", arXiv 2502.05795 (variance and angles), "Massive Activations in Large Language
Models", arXiv 2402.17762, "NormFormer", arXiv 2110.09456 (gradients over depth), "Scale-Distribution Decoupling", arXiv 2502.15499
(stability triad); cuts are ours unless a rule says otherwise.

    find.py        the residual additions in the graph
    watch.py       sees them while the model runs
    entropy.py     entropy of attention weights
    statistics.py  numbers of a hidden state
    measure.py     `measure_depth_profile`, `DepthProbe`
    profile.py     `DepthProfile`: table, JSON, figure
    fits.py        growth by a constant or by a factor
    subjects.py    probe and profile of what is audited
    placement.py   where the norms of the branches stand, read off the graph
    stuck.py       `StuckGradients`: a run whose first blocks get no gradient
    stability.py   `stability_probe`: the first steps again under three changes
    rules.py       NK901 to NK905
    placement_rules.py  NK906 to NK908, imported by rules.py
    published_rules.py  NK909 to NK914, imported by rules.py
    collapse.py    `EntropyCollapse`: attention that collapses while the loss or a gradient spikes
    commands.py    `pl-normkit profile`, `pl-normkit stability`
"""

from __future__ import annotations

__all__ = [
    "AdditionProfile",
    "DepthProbe",
    "DepthProfile",
    "EntropyCollapse",
    "Growth",
    "StabilityReport",
    "StuckGradients",
    "measure_depth_profile",
    "stability_probe",
]

from pl_normkit.methods.depth_profile.collapse import EntropyCollapse
from pl_normkit.methods.depth_profile.fits import Growth
from pl_normkit.methods.depth_profile.measure import DepthProbe, measure_depth_profile
from pl_normkit.methods.depth_profile.profile import AdditionProfile, DepthProfile
from pl_normkit.methods.depth_profile.stability import StabilityReport, stability_probe
from pl_normkit.methods.depth_profile.stuck import StuckGradients
